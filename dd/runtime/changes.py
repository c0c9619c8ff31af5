"""Which settings may change once a run has begun: they are marked where they are defined.

    def cifar10(root: Judging[str] = "data", ...): ...

`dd.config.changeable` collects the marks.
"""

from typing import Annotated, TypeVar

T = TypeVar("T")

WHEN_RESUMED = "may change when a run is resumed"
WHEN_JUDGED = "may change when a run's set is judged again"

#: How long a run goes on, what is shown of it, and how it is judged at its end.
Resumable = Annotated[T, WHEN_RESUMED]
#: What changes neither the set nor which images it was not distilled from, such as where they lie.
Judging = Annotated[T, WHEN_JUDGED]
#: Where cached files are.
Anytime = Annotated[T, WHEN_RESUMED, WHEN_JUDGED]
