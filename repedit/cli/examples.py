"""One working line of every verb, and its exit codes: what --help ends with, and what the pages of the documentation show."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, str] = {
    "demo": "repedit demo --act code --out edited/",
    "fetch": "repedit fetch smollm2-135m",
    "doctor": "repedit doctor smollm2-135m",
    "inspect": "repedit inspect smollm2-135m --sites '0-3.mlp.neurons'",
    "collect": "repedit collect smollm2-135m --text code --tokens 8000 --out code.safetensors",
    "score": "repedit score smollm2-135m --forget code --retain prose --out scores.safetensors",
    "prune": "repedit prune smollm2-135m --fraction 0.01 --forget code --retain prose --out edited/",
    "project": "repedit project smollm2-135m --forget capitals --rank 8 --out edited/",
    "unlearn": "repedit unlearn smollm2-135m --recipe small:npo_klr --forget capitals --out delta.safetensors",
    "apply": "repedit apply edit.safetensors smollm2-135m --out edited/",
    "diff": "repedit diff smollm2-135m edited/",
    "compare": "repedit compare smollm2-135m edited/ --text prose --prompt 'The capital of France is'",
    "chat": "repedit chat edited/ --original smollm2-135m",
    "audit": "repedit audit edited/ --original smollm2-135m --facts capitals --out audit/",
    "report": "repedit report audit/",
    "tasks": "repedit tasks harness/ --facts capitals,symbols",
    "run": "repedit run mine.toml",
    "reproduce": "repedit reproduce mine.toml",
    "push": "repedit push edited/ me/smollm2-edited",
    "vision demo": "repedit vision demo --forget class:3 --recipe relabel --out forgotten/",
}

INTERRUPTED, CUT_OFF = 130, 141
"""Exit codes that a shell gives to what SIGINT and SIGPIPE end."""
COMMON: Mapping[int, str] = {
    0: "done",
    1: "an unexpected exception",
    2: "bad input, with one message that says what to do",
    INTERRUPTED: "interrupted by Ctrl-C",
    CUT_OFF: "done, but the reader of standard output had closed it, as `head` does",
}
"""What every verb ends with."""
OWN: Mapping[str, Mapping[int, str]] = {
    "prune": {3: "the limit on what is retained was exceeded at once; nothing is written"},
    "unlearn": {3: "the model collapsed", 4: "a loss was not finite"},
    "audit": {
        0: "no recovery found", 3: "hidden, or not forgotten", 4: "inconclusive", 5: "invalid, or destroyed",
        6: "unsound: a control fails on this machine",
    },
    "run": {3: "or another: the code of the step that failed, or else of the last audit"},
    "reproduce": {1: "something differs"},
    "push": {0: "uploaded", 3: "nothing was uploaded, since --yes was not given"},
}  # fmt: skip
"""Where a verb means something else, or more."""


def codes(verb: str) -> dict[int, str]:
    """The exit codes of a verb, in their order."""
    return dict(sorted({**COMMON, **OWN.get(verb, {})}.items()))


def epilog(verb: str) -> str:
    """What the help of a verb ends with: its example and, where they are its own, its exit codes."""
    lines = [f"Example: {EXAMPLES[verb]}"] if verb in EXAMPLES else []
    if verb in OWN:
        lines.append("Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in codes(verb).items()))
    return "\n\n".join(lines)
