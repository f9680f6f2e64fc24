"""The part of a recipe's `teachers:` that says how the responses of one mode come to be."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OF_A_MODEL = {"path", "revision", "dtype", "trust_remote_code"}


class TeacherSection(BaseModel):
    """How `siesta warmup-data` gets the responses of one mode: see `siesta.rl.teachers`.

    `written` takes the data's own, `model` asks another model, `self` the recipe's own as it is published: without
    control tokens and with its whole chat template.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, serialize_by_alias=True)

    origin: Literal["written", "model", "self"] = Field(alias="from")
    path: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    trust_remote_code: bool = False
    system: str = ""
    instruction: str = Field(default="", description="Follows the question and `data.instruction`.")
    chat_template_kwargs: dict[str, Any] = {}
    thought: tuple[str, str] | None = Field(default=("<think>", "</think>"), description="What encloses its work.")
    max_tokens: int | None = Field(default=None, ge=1, description="In the teacher's tokens; the mode's if not set.")
    temperature: float | None = Field(default=None, gt=0, description="Greedy if not set.")
    samples: int = Field(default=1, ge=1, description="Responses to an example; the shortest right one is kept.")
    engine: Literal["generate", "vllm"] = "generate"
    batch_size: int = Field(default=16, ge=1, description="Examples that `generate` answers at a time.")
    vllm: dict[str, Any] = Field(default={}, description="Further arguments of vllm.LLM.")

    @model_validator(mode="after")
    def no_key_without_effect(self) -> "TeacherSection":
        # By value: a dumped recipe shows every key.
        fields = type(self).model_fields.items()
        given = {name for name, field in fields if name != "origin" and vars(self)[name] != field.default}
        useless = {"written": given, "self": given & OF_A_MODEL, "model": set()}[self.origin]
        if useless:
            hint = "; the model section has them" if self.origin == "self" else ""
            raise ValueError(f"{', '.join(sorted(useless))}: no effect with `from: {self.origin}`{hint}")
        if self.origin == "model" and self.path is None:
            raise ValueError("`from: model` needs a `path`: a folder or a hub name")
        if self.samples > 1 and self.temperature is None:
            raise ValueError("`samples` need a `temperature`: greedy responses are all the same")
        unused = {"vllm": "batch_size", "generate": "vllm"}[self.engine]
        if unused in given:
            raise ValueError(f"`{unused}` has no effect with `engine: {self.engine}`")
        return self
