"""The part of a recipe's `data:` that says which items a run is about."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ContextFree(BaseModel):
    """Drops the items of a source that are answered without their context: see `siesta.data.filter`."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    scores: str
    threshold: float = Field(default=0.5, gt=0, le=1)


class Source(BaseModel):
    """A file (.jsonl, .json, .parquet) or a hub data set."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal["gsm8k", "math", "aime", "deepscaler"] | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"
    context_free: ContextFree | None = None


class DataSection(BaseModel):
    """Items: a generated task, families of reasoning-gym, or sources with a column map."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    task: Literal["calc", "hop", "rule110", "graph"] | None = None
    families: list[str] | None = Field(default=None, min_length=1)
    level_weights: dict[int, float] | None = None
    queries: int = Field(default=1, ge=1, description="Of each context of a task.")
    task_size: int | None = Field(default=None, description="Bits of a row of rule110, nodes of graph.")
    train: Source | None = None
    validation: Source | None = None
    test: Source | None = None
    stateful_split: bool = Field(default=False, description="Problems of a source in two: siesta.data.stateful.")
    columns: dict[str, str] = {}
    verifier: str = "exact"
    instruction: str = ""
    train_size: int = Field(default=20_000, ge=1)
    unseen_share: float = Field(
        default=0.0, ge=0, lt=1, description="Of the questions; the warm-up does not see them, RL sees no others."
    )
    max_prompt_tokens: int = Field(default=512, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def one_origin(self) -> "DataSection":
        origins = [self.task, self.families, self.train]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give one of `task`, `families` and `train`")
        if self.train is not None and self.test is None:
            raise ValueError("`train` needs a `test` source beside it")
        if self.train is None and (self.test or self.validation or self.columns or self.verifier != "exact"):
            name = "a `task` has its" if self.task else "`families` have their"
            raise ValueError(f"{name} own splits and verifier: leave out test, validation, columns, verifier")
        if self.train is not None and self.level_weights is not None:
            raise ValueError("`level_weights` belongs to a `task` or to `families`")
        if self.train is None and self.stateful_split:
            raise ValueError("`stateful_split` belongs to a `train` source")
        if self.task is None and (self.queries > 1 or self.task_size is not None):
            raise ValueError("`queries` and `task_size` belong to a `task`")
        return self
