"""The part of a recipe that says how a context is consolidated before its queries come."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Mechanism = Literal["none", "raw", "notes", "latent", "gist", "memory"]

# Mechanisms whose state is tensors that training writes, with a gradient.
STATES = ("latent", "gist", "memory")

# The settings that only some mechanisms have.
BELONGS = {
    "sleeps": ("notes",),
    "weight": ("notes",),
    "price": ("notes",),
    "token": ("notes",),
    "max_tokens": ("notes",),
    "keep_tokens": ("notes",),
    "keep_context": ("notes",),
    "form": ("latent",),
    "truncate": ("latent",),
    "window": ("latent",),
    "slots": ("gist",),
    "layer": ("memory",),
    "segment": ("memory",),
}

# Of these, what says how training goes and leaves a state as it is.
TRAINING = ("sleeps", "weight", "price", "truncate")


class SleepSection(BaseModel):
    """One mechanism and its settings; the other mechanisms' settings are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    mechanism: Mechanism = "none"
    passes: int = Field(default=1, ge=1, description="N: over each context.")
    queries: int = Field(default=1, ge=1, description="m: of each context in a generation batch.")
    price: float = Field(default=0.1, ge=0, description="Of a sleep token, in wake tokens.")
    stateless: float = Field(default=0.0, ge=0, le=1, description="Share of contexts asked without own state.")
    # notes
    sleeps: int = Field(default=2, ge=2, description="J: notes drawn of each context, to be told apart by reward.")
    weight: float = Field(default=1.0, ge=0, description="Of the loss of the notes; that of the answers has 1.")
    token: str = Field(default="<sleep>", min_length=1, description="Opens the notes, as a control token a response.")
    max_tokens: int = Field(default=256, ge=2, description="Of the notes of one pass, their token included.")
    keep_tokens: int | None = Field(default=None, ge=1, description="Of the notes that wake sees; none: all.")
    keep_context: bool = Field(default=False, description="The reader sees the context beside the notes.")
    # latent
    form: Literal["carry_h", "reread"] = "carry_h"
    truncate: int | None = Field(default=None, ge=1, description="Gradients flow through the last so many passes.")
    window: int | None = Field(default=None, ge=1, description="Most tokens that attention sees at once.")
    # gist
    slots: int = Field(default=8, ge=1)
    # memory
    layer: int = Field(default=0, ge=0, description="The decoder layer whose output the branch reads.")
    segment: int = Field(default=16, ge=1, description="Tokens whose steps start from the same weights.")

    @model_validator(mode="after")
    def own_settings(self) -> "SleepSection":
        # By value: a dumped recipe shows every key.
        for name, mechanisms in BELONGS.items():
            if vars(self)[name] != type(self).model_fields[name].default and self.mechanism not in mechanisms:
                raise ValueError(f"`{name}` belongs to {' and '.join(mechanisms)}, not to {self.mechanism}")
        if self.mechanism in ("none", "raw") and self.passes > 1:
            raise ValueError(f"`{self.mechanism}` has a single pass")
        return self
