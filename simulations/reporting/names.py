"""What the lines of a sweep are called in a report: in words that need no machine learning."""

from __future__ import annotations

from dataclasses import dataclass

from common.study import Study
from simulations.reporting.curve import ALONE

NAMES = {
    "best-possible": "Best possible",
    "pooled-no-privacy": "All records in one place, no privacy",
    "federated-no-privacy": "Federated, no privacy",
    "pooled-private": "All records in one place, with privacy",
    "fedavg-one-step": "Federated, one step a round",
    "fedavg-local": "Federated, several steps a round",
    "naive": "Federated, as in tutorials",
    "logistic": "Federated logistic regression",
    "alone": "Each hospital alone (mean)",
    "prevalence": "Everybody gets the average risk",
}
EXPLAINED = {
    "best-possible": "what no model can exceed on these records; known because they are made up by a generator.",
    "pooled-no-privacy": "what could be reached if every record could be brought together and nobody had to be "
    "protected: the best of several ways to train, chosen on patients who are neither trained nor tested on.",
    "federated-no-privacy": "records stay in their hospital and nothing protects the patients; chosen in the same way.",
    "pooled-private": "one keeper of all records adds the noise once: as private, but every hospital must trust it.",
    "fedavg-one-step": "records stay; every hospital takes one small step a round and adds its own noise to it.",
    "fedavg-local": "records stay; fewer, longer rounds, for slow links.",
    "naive": "records stay; the settings of common example code.",
    "logistic": "records stay; a simple model that does not know the order of events.",
    "alone": "every hospital by itself with the same budget, scored on the patients of all; the bar goes from worst "
    "to best hospital.",
    "prevalence": "a model that knows nothing of the patient; as good as tossing a coin.",
}


@dataclass(frozen=True)
class Origin:
    """What is known of a sweep beside its rows.

    Attributes:
        study: the study that was swept, if its file is there.
        files: (name, text) of the configuration that the sweep was started with.
        command: what makes the sweep again.
    """

    study: Study | None = None
    files: tuple[tuple[str, str], ...] = ()
    command: str = ""


def name_of(line: str) -> str:
    """A line's name for people; one that is not known here keeps its own."""
    if line.startswith(ALONE):
        return f"{line.removeprefix(ALONE)} alone"
    return NAMES.get(line, line)


def setting_words(settings: tuple[tuple[str, object], ...]) -> str:
    """`key = value` of each setting, or that it is the study as it stands."""
    return ", ".join(f"{key} = {value}" for key, value in settings) or "the study as it stands"
