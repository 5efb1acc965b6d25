//! Floating-point operations of captioning one image, from a bundle's dimensions: two for each multiply-add of a matrix
//! product. This is the one definition that `inspect`, `profile` and `plan` share.
//!
//! Counted is what the graphs have to compute: products with weights (the patch embedding among them), attention's scores
//! and values for the positions that a token sees, and the logits head once for each new token. Not counted: norms,
//! activations, softmax, rotations, lookups, the arithmetic of quantisation, and what only padding or a mask adds (rows of
//! unequal prompts, wider cache heads, the cache beyond the last token). `rows x in -> out` costs `2 * rows * in * out`.
//! Sums saturate at `u64::MAX`.

use crate::manifest::{DecoderDims, VisionDims};

/// Floating-point operations by stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Flops {
    /// Vision tower.
    pub vision: u64,
    /// Projector.
    pub projector: u64,
    /// The prompt's and the image's tokens through the decoder; gives the first new token.
    pub prefill: u64,
    /// The other new tokens, one after the other.
    pub decode: u64,
    /// All of them.
    pub total: u64,
}

/// One image with `prompt_tokens` of text around it, captioned in `new_tokens` (the stop token is one).
#[must_use]
pub fn per_image(vision: &VisionDims, decoder: &DecoderDims, prompt_tokens: usize, new_tokens: usize) -> Flops {
    let length = vision.num_image_tokens.saturating_add(prompt_tokens);
    let tower = vision_tower(vision);
    let projector = projector(vision, decoder);
    let prefill = prefill(decoder, length);
    let decode = decode(decoder, length, new_tokens);
    let total = sum([tower, projector, prefill, decode]);
    Flops { vision: tower, projector, prefill, decode, total }
}

/// The vision tower over one image. With `P` patches, `T = P + 1` tokens, width `C`, MLP width `I`, patch side `p`:
///
/// ```text
/// patch embedding           2 P 3pp C
/// each layer computed       8 T C C       query, key, value, output
///                           4 T T C       scores and values, every token sees every token
///                           4 T C I       MLP
/// ```
#[must_use]
pub fn vision_tower(dims: &VisionDims) -> u64 {
    let VisionDims { image_size, patch_size, hidden_size, intermediate_size, num_layers, .. } = *dims;
    let patches_per_side = image_size / patch_size.max(1);
    let num_patches = patches_per_side.saturating_mul(patches_per_side);
    let num_tokens = num_patches.saturating_add(1);
    let layer = sum([
        product(&[8, num_tokens, hidden_size, hidden_size]),
        product(&[4, num_tokens, num_tokens, hidden_size]),
        product(&[4, num_tokens, hidden_size, intermediate_size]),
    ]);
    sum([product(&[2, num_patches, 3, patch_size, patch_size, hidden_size]), times(layer, num_layers)])
}

/// The projector over one image: `N` image tokens, from `F` (the tower's width for each hidden state taken) to `H` to `H`:
/// `2 N F H + 2 N H H`.
#[must_use]
pub fn projector(vision: &VisionDims, decoder: &DecoderDims) -> u64 {
    let feature_size = vision.hidden_size.saturating_mul(vision.feature_layers.len());
    let (num_tokens, hidden_size) = (vision.num_image_tokens, decoder.hidden_size);
    sum([product(&[2, num_tokens, feature_size, hidden_size]), product(&[2, num_tokens, hidden_size, hidden_size])])
}

/// `S` tokens, the image's among them, into an empty cache. With `L` layers, width `H`, `h` heads of width `d`, `k`
/// key/value heads, MLP width `I`, vocabulary `V`:
///
/// ```text
/// all layers                2 S H (h + 2k) d        query, key, value
///                           4 h d S (S + 1) / 2     scores and values: token i sees i tokens
/// all layers but the last   S (2 h d H + 6 H I)     output, MLP
/// the last layer            2 h d H + 6 H I         of the last token only: nothing reads the others
/// head                      2 H V                   of the last token only
/// ```
#[must_use]
pub fn prefill(dims: &DecoderDims, num_tokens: usize) -> u64 {
    prefill_behind(dims, 0, num_tokens)
}

/// The same behind `num_cached` tokens that the cache holds already: token `i` sees `num_cached + i`.
#[must_use]
pub fn prefill_behind(dims: &DecoderDims, num_cached: usize, num_tokens: usize) -> u64 {
    if num_tokens == 0 {
        return 0;
    }
    let num_seen =
        (product(&[num_tokens, num_tokens.saturating_add(1)]) / 2).saturating_add(product(&[num_tokens, num_cached]));
    let rows_of_mlp = product(&[dims.num_layers.saturating_sub(1), num_tokens]).saturating_add(1);
    sum([
        product(&[dims.num_layers, num_tokens]).saturating_mul(qkv(dims)),
        times(num_seen.saturating_mul(attention(dims)), dims.num_layers),
        rows_of_mlp.saturating_mul(output_and_mlp(dims)),
        head(dims),
    ])
}

/// The new tokens after the first, which prefill gives: `new_tokens - 1` steps after `num_tokens` in the cache. A step that
/// sees `n` tokens, its own among them, costs `L (2 H (h + 2k) d + 4 h d n + 2 h d H + 6 H I) + 2 H V`.
#[must_use]
pub fn decode(dims: &DecoderDims, num_tokens: usize, new_tokens: usize) -> u64 {
    let num_steps = new_tokens.saturating_sub(1);
    // Step k sees num_tokens + k.
    let num_seen =
        product(&[num_steps, num_tokens]).saturating_add(product(&[num_steps, num_steps.saturating_add(1)]) / 2);
    decode_steps(dims, num_steps as u64, num_seen)
}

/// `num_steps` decode steps of single captions that see `num_seen` tokens in all, each its own among them.
#[must_use]
pub fn decode_steps(dims: &DecoderDims, num_steps: u64, num_seen: u64) -> u64 {
    let layer = qkv(dims).saturating_add(output_and_mlp(dims));
    let step = times(layer, dims.num_layers).saturating_add(head(dims));
    step.saturating_mul(num_steps).saturating_add(times(num_seen.saturating_mul(attention(dims)), dims.num_layers))
}

/// Query, key and value of one token in one layer.
fn qkv(dims: &DecoderDims) -> u64 {
    let num_heads = dims.num_heads.saturating_add(dims.num_kv_heads.saturating_mul(2));
    product(&[2, dims.hidden_size, num_heads, dims.head_dim])
}

/// Scores and values of one token in one layer, for each token that it sees.
fn attention(dims: &DecoderDims) -> u64 {
    product(&[4, dims.num_heads, dims.head_dim])
}

/// What comes after attention, of one token in one layer: the output projection, and gate, up and down of the MLP.
fn output_and_mlp(dims: &DecoderDims) -> u64 {
    let output = product(&[2, dims.num_heads, dims.head_dim, dims.hidden_size]);
    output.saturating_add(product(&[6, dims.hidden_size, dims.intermediate_size]))
}

/// Logits of one token.
fn head(dims: &DecoderDims) -> u64 {
    product(&[2, dims.hidden_size, dims.vocab_size])
}

fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1, |product: u64, &factor| times(product, factor))
}

fn times(value: u64, count: usize) -> u64 {
    value.saturating_mul(count as u64)
}

fn sum<const N: usize>(values: [u64; N]) -> u64 {
    values.into_iter().fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CLIP ViT-L/14 at 336 pixels, the second-last hidden state.
    fn clip_large() -> VisionDims {
        VisionDims {
            image_size: 336,
            patch_size: 14,
            hidden_size: 1024,
            intermediate_size: 4096,
            num_layers: 23,
            feature_layers: vec![23],
            num_image_tokens: 576,
        }
    }

    fn llama_3_8b() -> DecoderDims {
        DecoderDims {
            num_layers: 32,
            hidden_size: 4096,
            intermediate_size: 14_336,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            vocab_size: 128_256,
            max_position_embeddings: 8192,
        }
    }

    /// 576 patches, 577 tokens.
    ///
    /// ```text
    /// patch embedding     2 * 576 * (3 * 14 * 14 = 588) * 1024    =        693,633,024
    /// q, k, v, output     8 * 577 * 1024 * 1024                   =      4,840,226,816
    /// scores, values      4 * 577 * 577 * 1024                    =      1,363,677,184
    /// MLP                 4 * 577 * 1024 * 4096                   =      9,680,453,632
    /// a layer                                                     =     15,884,357,632
    /// 23 layers                                                   =    365,340,225,536
    /// all                                                         =    366,033,858,560
    /// ```
    #[test]
    fn vision_tower_of_llava_1_5() {
        assert_eq!(vision_tower(&clip_large()), 366_033_858_560);
    }

    /// `2 * 576 * 1024 * 4096 = 4,831,838,208` and `2 * 576 * 4096 * 4096 = 19,327,352,832`.
    #[test]
    fn projector_of_llava_1_5() {
        assert_eq!(projector(&clip_large(), &llama_3_8b()), 24_159_191_040);
        // Two hidden states: the first product is twice as wide.
        let two = VisionDims { feature_layers: vec![11, 23], ..clip_large() };
        assert_eq!(projector(&two, &llama_3_8b()), 24_159_191_040 + 4_831_838_208);
    }

    /// 576 image tokens and 60 of text: 636.
    ///
    /// ```text
    /// qkv of a token      2 * 4096 * (32 + 2 * 8) * 128           =         50,331,648
    /// output of a token   2 * 4096 * 4096                         =         33,554,432
    /// MLP of a token      6 * 4096 * 14336                        =        352,321,536
    /// qkv                 32 * 636 * 50,331,648                   =  1,024,349,700,096
    /// scores, values      32 * 4 * 4096 * (636 * 637 / 2 = 202,566) =  106,202,923,008
    /// output, MLP         (31 * 636 + 1 = 19,717) * 385,875,968   =  7,608,316,461,056
    /// head                2 * 4096 * 128256                       =      1,050,673,152
    /// all                                                         =  8,739,919,757,312
    /// ```
    #[test]
    fn prefill_of_llama_3_8b() {
        assert_eq!(prefill(&llama_3_8b(), 636), 8_739_919_757_312);
        // One token: 32 layers of (50,331,648 + 4 * 4096 + 385,875,968), and the head.
        assert_eq!(prefill(&llama_3_8b(), 1), 32 * 436_224_000 + 1_050_673_152);
        assert_eq!(prefill(&llama_3_8b(), 0), 0);
    }

    /// 64 new tokens are 63 steps, which see 637, 638, … 699 tokens: 42,084 in all.
    ///
    /// ```text
    /// layers of a step    32 * (50,331,648 + 385,875,968)         =     13,958,643,712
    /// head of a step                                              =      1,050,673,152
    /// 63 steps            63 * 15,009,316,864                     =    945,586,962,432
    /// scores, values      32 * 4 * 4096 * 42,084                  =     22,064,136,192
    /// all                                                         =    967,651,098,624
    /// ```
    #[test]
    fn decode_of_llama_3_8b() {
        assert_eq!(decode(&llama_3_8b(), 636, 64), 967_651_098_624);
        assert_eq!(decode(&llama_3_8b(), 636, 1), 0, "prefill gives the first token");
    }

    #[test]
    fn an_image_is_the_sum_of_its_stages() {
        let flops = per_image(&clip_large(), &llama_3_8b(), 60, 64);
        let stages = [366_033_858_560, 24_159_191_040, 8_739_919_757_312, 967_651_098_624];
        assert_eq!([flops.vision, flops.projector, flops.prefill, flops.decode], stages);
        assert_eq!(flops.total, 10_097_763_905_536);
    }

    /// Prefill in one go and token by token see the same: what differs is that single tokens all pass the last layer's MLP
    /// and the head.
    #[test]
    fn decode_steps_agree_with_prefill() {
        let dims = llama_3_8b();
        let steps = prefill(&dims, 1) + decode(&dims, 1, 10);
        assert_eq!(steps, prefill(&dims, 10) + 9 * (385_875_968 + 1_050_673_152));
    }

    /// Tokens that were read before cost what prefill of them alone costs, but for their last layer's MLP and their head, which
    /// prefill of all computes for the last token only.
    #[test]
    fn prefill_behind_cached_tokens_is_the_rest_of_prefill() {
        let dims = llama_3_8b();
        let parts = prefill(&dims, 6) + prefill_behind(&dims, 6, 4);
        assert_eq!(parts, prefill(&dims, 10) + 385_875_968 + 1_050_673_152);
        assert_eq!(prefill_behind(&dims, 6, 0), 0);
    }

    #[test]
    fn absurd_dimensions_saturate() {
        let max = usize::MAX;
        let dims = DecoderDims { num_layers: max, hidden_size: max, num_heads: max, num_kv_heads: max, ..llama_3_8b() };
        let vision = VisionDims { image_size: max, patch_size: 0, hidden_size: max, ..clip_large() };
        assert_eq!(per_image(&vision, &dims, max, max).total, u64::MAX);
    }
}
