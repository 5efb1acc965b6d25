"""transformers: LlavaForConditionalGeneration.generate with torch's attention, one batch after another."""

from __future__ import annotations

from serve import Caption, parser, private_output, serve
from specs import framed_prompt


def main() -> None:
    args = parser(__doc__, ["fp32", "bf16"]).parse_args()
    answers = private_output()
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(args.threads)
    processor = transformers.AutoProcessor.from_pretrained(args.model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        args.model, dtype=dtype, attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def caption(files: list[str], new_tokens: int) -> list[Caption]:
        captions: list[Caption] = []
        for first in range(0, len(files), args.batch):
            images = [Image.open(file).convert("RGB") for file in files[first : first + args.batch]]
            prompts = [framed_prompt("<image>")] * len(images)
            inputs = processor(text=prompts, images=images, return_tensors="pt", add_special_tokens=False)
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
            limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            ids = model.generate(**inputs, do_sample=False, **limits)[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(ids, skip_special_tokens=True)
            captions += [(text, ids.shape[1]) for text in texts]
        return captions

    serve(answers, f"transformers {transformers.__version__}, torch {torch.__version__}", caption)


if __name__ == "__main__":
    main()
