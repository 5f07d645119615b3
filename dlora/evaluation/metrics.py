"""Scores of answers beside references, by the libraries that the field reports them with.

    exact_match              share of answers that equal a reference, white space around them apart
    bleu, chrf               sacrebleu's corpus scores, 0 to 100, its default tokenisation
    rouge1, rouge2, rougeL   rouge-score's F-measure without stemming, 0 to 1, mean over answers

An answer may have several references. Sources: Post 2018, https://arxiv.org/abs/1804.08771; Popović
2015, https://aclanthology.org/W15-3049; Lin 2004, https://aclanthology.org/W04-1013.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any

from dlora.config.output import Score
from dlora.errors import UsageError

References = Sequence[Sequence[str]]  # of each answer, one or more
_NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu"}
_NEEDS |= dict.fromkeys(("rouge1", "rouge2", "rougeL"), "rouge_score")


def scores(
    names: Sequence[Score], answers: Sequence[str], references: References
) -> dict[str, float]:
    """The scores of these names.

    Args:
        answers: one or more.
        references: of each answer.
    """
    return {name: METRICS[name](answers, references) for name in names}


def check_installed(names: Sequence[Score], option: str) -> None:
    """Raise a `UsageError` that names `option` unless the libraries of the scores are here."""
    for name in names:
        try:
            METRICS[name](["a"], [["a"]])
        except ImportError:
            package = _NEEDS[name].replace("_", "-")
            raise UsageError(
                f"{option}: {name} needs {package}: pip install 'dlora[eval]'"
            ) from None


def exact_match(answers: Sequence[str], references: References) -> float:
    """Share of answers that equal one of their references."""
    pairs = zip(answers, references, strict=True)
    return fmean(any(a.strip() == r.strip() for r in wanted) for a, wanted in pairs)


def bleu(answers: Sequence[str], references: References) -> float:
    """sacrebleu's BLEU."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), _streams(references)).score)


def chrf(answers: Sequence[str], references: References) -> float:
    """sacrebleu's chrF2."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(answers), _streams(references)).score)


def _streams(references: References) -> Any:
    """The k-th references of all answers, for each k; None where an answer has fewer."""
    return [list(stream) for stream in zip_longest(*references)]


def _rouge(kind: str) -> Callable[[Sequence[str], References], float]:
    def score(answers: Sequence[str], references: References) -> float:
        """rouge-score's F-measure, of each answer beside the reference that is nearest."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=False)
        pairs = zip(answers, references, strict=True)
        return fmean(scorer.score_multi(list(r), a)[kind].fmeasure for a, r in pairs)

    return score


METRICS: dict[Score, Callable[[Sequence[str], References], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
}
