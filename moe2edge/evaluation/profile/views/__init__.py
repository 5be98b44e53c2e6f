"""Views of the JSON document of a profile: an HTML page, Markdown, JUnit, a Chrome trace."""
