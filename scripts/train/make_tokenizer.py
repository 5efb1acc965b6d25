"""Train the byte-level BPE tokenizer (LLaMA-3 layout) on captions and the prompt; write its files."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scenes import caption, sample_scene
from vocabulary import BOS, EOT, IMAGE, PAD, PROMPT, SPECIAL_TOKENS

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Message content may be a string (image first) or a list of image and text parts.
CHAT_TEMPLATE = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {%- if message['role'] == 'user' and loop.first and '<image>' not in message['content'] %}
            {{- '<image>\\n' }}
        {%- endif %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'image' %}
            {{- '<image>\\n' }}
        {%- endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""


def build(captions: int, vocab_size: int, seed: int) -> Tokenizer:
    """BPE over generated captions; the special tokens take the last ids."""
    rng = random.Random(seed)
    texts = [caption(sample_scene(rng, False, ((256, 256),))) for _ in range(captions)]
    texts += [PROMPT, "user\n\n", "assistant\n\n", "system\n\n", "\n"] * (captions // 20)
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(
        trim_offsets=False
    )  # adds no token: the template has the BOS
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer files")
    parser.add_argument("--captions", type=int, default=20000)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build(args.captions, args.vocab_size, args.seed)
    tokenizer.save(str(args.out / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    config = {
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": IMAGE},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.out / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")
    (args.out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
