"""Ask an exported model that vLLM serves: the model chooses how to answer, a mode is forced, or a threshold decides.

    vllm serve outputs/quickstart/export --served-model-name siesta      # siesta and vllm installed in one environment
    python examples/ask.py "<calc> 3 +4 ; ; ; ; ; ; ;" --modes outputs/quickstart/export/modes.json --threshold 0.3

Any OpenAI client works the same way: what is ours travels in `extra_body={"vllm_xargs": {...}}`.
"""

import argparse
import json
from pathlib import Path

import openai


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--modes", type=Path, required=True, help="modes.json of the exported folder")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    options = parser.parse_args()
    rules = json.loads(options.modes.read_text(encoding="utf-8"))
    wishes = {"mode": options.mode} | ({} if options.threshold is None else {"threshold": options.threshold})
    # Prompts of the training closed with the instruction, so those of its users should.
    content = "\n".join(part for part in (options.question, rules["instruction"]) if part)
    reply = openai.OpenAI(base_url=options.url, api_key="none").chat.completions.create(
        model="siesta",
        messages=[{"role": "user", "content": content}],
        temperature=0.0,
        extra_body={"vllm_xargs": wishes},
    )
    text = reply.choices[0].message.content or ""
    mode = next((mode for mode in rules["modes"] if text.startswith(mode["token"])), None)
    name, answer = (mode["name"], text.removeprefix(mode["token"])) if mode else ("no mode", text)
    print(f"[{name}, {reply.usage.completion_tokens if reply.usage else '?'} tokens] {answer.strip()}")


if __name__ == "__main__":
    main()
