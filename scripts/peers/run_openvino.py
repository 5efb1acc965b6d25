"""OpenVINO GenAI: ContinuousBatchingPipeline, --batch captions handed over at a time.

--instances makes several pipelines with their share of the threads each, which take batches in turn: what
engines are to recaption. --scheduler whole prefills each prompt in one piece, not mixed with decode steps.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serve import Caption, parser, private_output, serve
from specs import framed_prompt

IMAGE_TAG = "<ov_genai_image_0>"
# Bytes of cache that a token takes are the model's; a block has 32 tokens, and the pool is given in whole GB.
GIGABYTE = 1 << 30


def main() -> None:
    options = parser(__doc__, ["int8", "fp32", "bf16"])
    options.add_argument("--instances", type=int, default=1)
    options.add_argument("--scheduler", choices=["split", "whole"], default="split")
    options.add_argument(
        "--kv", choices=["u8", "f32", "bf16"], help="[default: u8 for int8, else the precision]"
    )
    options.add_argument("--kv-values", type=int, default=30720, help="keys and values that a token caches")
    args = options.parse_args()
    answers = private_output()
    import numpy as np
    import openvino
    import openvino_genai
    from PIL import Image

    kv = args.kv or {"int8": "u8", "fp32": "f32", "bf16": "bf16"}[args.precision]
    per_caption = args.kv_values * args.max_length * {"u8": 1.25, "f32": 4, "bf16": 2}[kv]
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if args.precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": max(1, args.threads // args.instances),
    }
    if args.instances > 1:
        # Pinned, all instances would sit on the first cores.
        properties["ENABLE_CPU_PINNING"] = False

    def pipeline() -> openvino_genai.ContinuousBatchingPipeline:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = args.batch
        scheduler.max_num_batched_tokens = max(4096, args.max_length)
        scheduler.cache_size = int(per_caption * args.batch / GIGABYTE) + 1
        scheduler.dynamic_split_fuse = args.scheduler == "split"
        scheduler.enable_prefix_caching = False
        decoder = properties | {"KV_CACHE_PRECISION": kv}
        return openvino_genai.ContinuousBatchingPipeline(
            args.model, scheduler, "CPU", decoder, {}, properties
        )

    idle: queue.SimpleQueue[openvino_genai.ContinuousBatchingPipeline] = queue.SimpleQueue()
    for _ in range(args.instances):
        idle.put(pipeline())
    # GenAI itself puts the line break after a LLaVA image.
    prompt = framed_prompt(IMAGE_TAG).replace(IMAGE_TAG + "\n", IMAGE_TAG)

    def caption_batch(files: list[str], new_tokens: int) -> list[Caption]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        images = [[openvino.Tensor(np.asarray(Image.open(file).convert("RGB"))[None])] for file in files]
        pipe = idle.get()
        try:
            prompts, configs = [prompt] * len(files), [config] * len(files)
            results = pipe.generate(prompts, images=images, generation_config=configs)
        finally:
            idle.put(pipe)
        # Each result counts the tokens of its whole batch.
        num_tokens = [result.perf_metrics.get_num_generated_tokens() / len(files) for result in results]
        return [(result.texts[0], count) for result, count in zip(results, num_tokens, strict=True)]

    def caption(files: list[str], new_tokens: int) -> list[Caption]:
        batches = [files[first : first + args.batch] for first in range(0, len(files), args.batch)]
        if args.instances == 1:
            return [row for batch in batches for row in caption_batch(batch, new_tokens)]
        with ThreadPoolExecutor(args.instances) as pool:
            done = pool.map(lambda batch: caption_batch(batch, new_tokens), batches)
            return [row for batch in done for row in batch]

    serve(answers, f"openvino-genai {openvino_genai.__version__.split('-')[0]}", caption)


if __name__ == "__main__":
    main()
