"""The outcomes of an evaluation: one list for audits of language models, audits of classifiers and verdicts on metrics.

The rules stand where their statistics are: `repedit.auditing.verdict` and `repedit.metrics.collapse`.
"""

UNSOUND = "UNSOUND"
"""A control of the evaluation itself failed, so nothing can be concluded."""
INVALID = "INVALID"
"""The data or the original model cannot answer the question."""
DESTROYED = "DESTROYED"
"""The model is damaged: what should have been retained is lost."""
NOT_FORGOTTEN = "NOT FORGOTTEN"
"""The model still answers when simply asked."""
HIDDEN = "HIDDEN"
"""An attack brings the knowledge back."""
OVER_FORGOTTEN = "OVER-FORGOTTEN"
"""The model treats what was forgotten as stranger than what was never seen, which shows what was removed."""
BELOW_THRESHOLD = "BELOW THRESHOLD"
"""General ability fell below the share that a benchmark requires."""
PASS = "NO RECOVERY FOUND"
"""No attack brought anything back."""
NOT_YET = "NOTHING FOUND YET"
"""The attacks made so far brought nothing back; more are planned, or belong to a larger budget."""
CONSISTENT = "CONSISTENT WITH FORGETTING"
"""Metrics without attacks show nothing else."""
INCONCLUSIVE = "INCONCLUSIVE"
"""The measurements do not decide, or there is nothing to compare with."""

OUTCOMES = (
    UNSOUND, INVALID, DESTROYED, NOT_FORGOTTEN, HIDDEN, OVER_FORGOTTEN, BELOW_THRESHOLD, PASS, NOT_YET, CONSISTENT,
    INCONCLUSIVE,
)  # fmt: skip
"""Every outcome, in the order in which rules are tried."""
EXIT_CODES = {
    PASS: 0, CONSISTENT: 0, NOT_FORGOTTEN: 3, HIDDEN: 3, OVER_FORGOTTEN: 3, BELOW_THRESHOLD: 3, NOT_YET: 4, INCONCLUSIVE: 4,
    INVALID: 5, DESTROYED: 5, UNSOUND: 6,
}  # fmt: skip
"""The exit code of a command that ends with an outcome."""
