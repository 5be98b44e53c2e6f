"""Speed beside busy processes, and what it costs on an idle machine."""
