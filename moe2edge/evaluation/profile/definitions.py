"""Definitions of the names in a profile."""

from __future__ import annotations

from collections.abc import Mapping

DEFINITIONS: Mapping[str, str] = {
    "id": "name of the measurement, a ULID: names sort by time",
    "import_ms": "import of the libraries that the runtime needs, in a fresh process",
    "load_ms": "opening the folder in its runtime, warm: its files are in the cache of the system",
    "cold": (
        "opening the folder after its files were dropped from the cache of the system; page_cache "
        "says if they left it (evicted, partly, unknown); major_faults up to the first token"
    ),
    "first_token_ms": (
        "time to the first token of the first prompt behind the load, which also reads what the "
        "load left on the disk"
    ),
    "ttft_ms": "time to first token: from token ids to the first token; no tokenization",
    "prefill_tok_s": "prompt tokens / time to first token",
    "ms_per_token": "time from one token to the next, tokens 2 to n",
    "decode_tok_s": "per prompt: (n - 1) / time from the first token to the last",
    "e2e_ms": "per prompt: from token ids to the last token",
    "tokenise_ms": (
        "tokenizer of the folder on the text of one prompt, in the process that starts the others; "
        "part of no other time"
    ),
    "mad": "median of the distances of the samples from their median",
    "ci95": (
        "95 % interval of the median: percentile bootstrap, 2000 draws of processes and then of "
        "samples of each, so that it holds for another process on this machine; with few "
        "processes it covers less (with 3 some 80 %, with 12 90 %); processes: number of them, "
        "0: the one that starts the others"
    ),
    "verdict": (
        "invalid: greedy decoding gave different tokens in different processes; throttled: the "
        "processors were, for their heat; noisy: other programs kept them busy; stable: none of it"
    ),
    "peak_rss": "largest resident set of the process within the phase, libraries included",
    "rss": "resident set at the end of the phase",
    "rss_anon": "anonymous part of rss, which counts against a memory limit",
    "rss_file": "part of rss that is mapped from files; the system can drop and reread it",
    "pss": (
        "resident set in which a page that n processes map counts as 1/n of it; read once in each "
        "process at the end of the phase, where nothing that is timed follows: behind the prompt "
        "of the warm-up, and behind the last token"
    ),
    "private_dirty": (
        "memory that the process alone maps and has written, of its own or of a file; read as pss"
    ),
    "major_faults": (
        "times that the process waited for a page to be read from a disk, within the phase"
    ),
    "above_floor": (
        "bytes above those of the same process just before it opened the folder, which has all "
        "libraries and no model"
    ),
    "timeline": "resident memory over time, sampled in a process that is not timed",
    "experts": (
        "tokens of a prompt and its continuation that choose each expert, counted apart; "
        "coverage_pct: experts that were chosen at all; load_imbalance: standard deviation / mean "
        "of the tokens of an expert, mean over the layers; hit_per_token: experts that a token "
        "chooses, skipped ones left out; new_per_token: those of them that the token before did "
        "not choose; last_tokens: the experts of each of the last tokens"
    ),
    "router_entropy": (
        "entropy of the softmax of all logits of a router, in nats, mean over the tokens, and over "
        "the layers; ln(experts): it prefers none"
    ),
    "load_entropy": (
        "entropy of the load over the experts of a layer, in nats, and its mean over the layers; "
        "ln(experts): each has the same"
    ),
    "breakdown": (
        "times by the runtime's own profiler, in a process that is not timed; gap: what no "
        "operator accounts for"
    ),
    "fallback_nodes": (
        "nodes of a graph that ran on another provider (got_ep) than the first that was asked for "
        "(wanted_ep); pct: of the time of both phases"
    ),
    "joules_per_token": (
        "energy of the processors, and of GPUs in use, while decoding / tokens, other programs "
        "included; sensors.energy_of names them"
    ),
    "quality": (
        "perplexity, KL to the source in nats per token and part of equal top-1 tokens, of the "
        "export's report or measured (--quality); each with its standard error, from the spread "
        "between the samples of the text; sha256 is of the token ids of the text"
    ),
    "sensors": "mean frequency and highest temperature at begin and end of each process",
    "memory": "largest value of each phase over all processes",
    "ratios": "of the medians of one round, to the first folder; median, and smallest and largest",
    "bytes_per_token": (
        "bytes of weights as the folder holds them that one token reads (every matrix once, the "
        "head, the chosen experts, one row of the embedding), and the cache of keys and values at "
        "the end of the text"
    ),
    "bandwidth": "rate at which the threads of the runtime read an array larger than all caches",
    "ceiling_tok_s": "bandwidth / bytes_per_token: tokens per second if nothing else took time",
    "reached_pct": (
        "decode_tok_s as a percentage of ceiling_tok_s; over 100 where weights stay in a cache of "
        "the processor, low where a runtime widens them"
    ),
    "host_fingerprint": (
        "digest of processor, usable cores, memory in GiB and system; timings of two profiles are "
        "compared only where it is equal"
    ),
    "weights": "bytes of the files that hold weights",
    "dtype": "dtype of activations between operators, as the runtime reports it",
    "note": "how quantized matrices run; empty if there are none, or it is not known",
    "threads": "asked: null for one per core; runtime: threads of torch or of the ONNX session",
    "governor": "what chooses the frequency of the processors (Linux)",
    "container": (
        "limits of the control groups: cpu_quota in processors, mem_limit in bytes; null: none, or "
        "the system does not tell"
    ),
    "power_source": "mains or battery; null where the system tells of no battery",
    "env": "null where the system does not report it, or the package is not installed",
}
