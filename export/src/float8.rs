//! FLOAT8E4M3FN, ONNX's 8-bit float for weights and activations (<https://onnx.ai/onnx/technical/float8.html>): a sign, 4
//! bits of exponent with a bias of 7, 3 of mantissa; no infinities, and one NaN of each sign, 0x7f and 0xff.

use half::f16;

/// The largest number.
pub(crate) const MAX: f32 = 448.0;
/// The NaN without a sign.
const NAN: u8 = 0x7f;
/// Exponents' biases, f32's less this type's.
const BIAS_DIFFERENCE: u32 = 127 - 7;
/// The largest scale of fp16 whose product with [`MAX`] is one of fp16: 65,464.
const MAX_SCALE: f16 = f16::from_f32_const(146.125);
/// Bits of an f32's mantissa that have no place here.
const DROPPED_BITS: u32 = 23 - 3;
/// The smallest number with a full mantissa, 2^-6. Below, numbers are 2^-9 apart.
const MIN_NORMAL: f32 = 0.015_625;
/// An f32 of this size has steps of 2^-9: adding it rounds, halves to even.
const SUBNORMAL_SHIFT: f32 = 16_384.0;

/// The nearest number, halves to even; what is beyond [`MAX`], infinities too, becomes it, as by ONNX's `saturate`. A NaN
/// stays one.
#[inline(always)]
pub(crate) fn from_f32(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    if value.is_nan() {
        return sign | NAN;
    }
    let magnitude = value.abs().min(MAX);
    let code = if magnitude < MIN_NORMAL {
        (magnitude + SUBNORMAL_SHIFT).to_bits() - SUBNORMAL_SHIFT.to_bits()
    } else {
        let bits = magnitude.to_bits();
        let is_odd = (bits >> DROPPED_BITS) & 1;
        let rounded = bits + ((1 << (DROPPED_BITS - 1)) - 1) + is_odd;
        (rounded >> DROPPED_BITS) - (BIAS_DIFFERENCE << 3)
    };
    sign | code as u8
}

/// Appends `values` divided by `scale`, which is positive.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
pub(crate) fn encode(scale: f32, values: &[f32], data: &mut Vec<u8>) {
    data.extend(values.iter().map(|value| from_f32(value / scale)));
}

/// The scale that brings `largest` to [`MAX`], as the fp16 that the graph stores; none where `largest` is NaN or no number of
/// fp16. It is at least fp16's smallest full number: TensorRT's parser wants positive scales, and smaller ones would lose
/// digits where these codes lose none. It is at most [`MAX_SCALE`].
pub(crate) fn scale(largest: f32) -> Option<f16> {
    let is_f16 = largest <= f16::MAX.to_f32();
    is_f16.then(|| f16::from_f32(largest / MAX).clamp(f16::MIN_POSITIVE, MAX_SCALE))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use sha2::{Digest, Sha256};

    use super::*;
    use crate::calibrate::{self, Windows};
    use crate::checkpoint::{Checkpoint, Part};
    use crate::config::LlavaConfig;
    use crate::graph::{DataType, hex};
    use crate::inspect::{GraphContents, read_model};
    use crate::lint::check_bundle;
    use crate::proto::TensorProto;
    use crate::{BundleManifest, Calibration, ExportOptions, Precision, Target, export};

    /// `scripts/golden/make_float8.py` makes the goldens.
    fn golden() -> serde_json::Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/float8_e4m3.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// The numbers of the codes from 0 to 0x7e, which ascend.
    fn positive_values() -> Vec<f32> {
        let bits: Vec<Option<u32>> = serde_json::from_value(golden()["values"].clone()).unwrap();
        assert_eq!(bits.len(), 256);
        assert!(bits.iter().enumerate().all(|(code, bits)| bits.is_none() == (code & 0x7f == 0x7f)));
        let values: Vec<f32> = bits[..0x7f].iter().map(|bits| f32::from_bits(bits.unwrap())).collect();
        let negative = bits[0x80..0xff].iter().map(|bits| f32::from_bits(bits.unwrap()));
        assert!(values.iter().zip(negative).all(|(value, negative)| (-value).to_bits() == negative.to_bits()));
        assert!(values.is_sorted_by(|a, b| a < b));
        values
    }

    #[test]
    fn every_number_is_its_own_code_and_what_lies_between_goes_to_the_nearer() {
        let values = positive_values();
        assert_eq!((values[0], values[1], values[0x7e]), (0.0, 2.0_f32.powi(-9), MAX));
        for (code, pair) in values.windows(2).enumerate() {
            let [low, high] = *pair else { unreachable!("windows of two") };
            let (low_code, high_code) = (code as u8, code as u8 + 1);
            // Exact: both have few bits.
            let middle = f32::midpoint(low, high);
            let even = if low_code.is_multiple_of(2) { low_code } else { high_code };
            let cases = [
                (low, low_code),
                (low.next_up(), low_code),
                (middle.next_down(), low_code),
                (middle, even),
                (middle.next_up(), high_code),
                (high.next_down(), high_code),
                (high, high_code),
            ];
            for (value, expected) in cases {
                assert_eq!(from_f32(value), expected, "{value}");
                assert_eq!(from_f32(-value), expected | 0x80, "-{value}");
            }
        }
    }

    #[test]
    fn all_numbers_of_fp16_go_where_ml_dtypes_puts_them() {
        let codes: Vec<u8> = (0..=u16::MAX).map(|bits| from_f32(f16::from_bits(bits).to_f32())).collect();
        assert_eq!(hex(&Sha256::digest(codes)), golden()["sha256"]);
    }

    #[test]
    fn what_is_too_large_saturates_and_only_nan_is_nan() {
        for large in [MAX.next_up(), 464.0, 464.0_f32.next_up(), 480.0, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!((from_f32(large), from_f32(-large)), (0x7e, 0xfe), "{large}");
        }
        assert_eq!((from_f32(f32::NAN) & 0x7f, from_f32(-f32::NAN) & 0x7f), (0x7f, 0x7f));
        for small in [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 2.0_f32.powi(-10)] {
            assert_eq!((from_f32(small), from_f32(-small)), (0, 0x80), "{small}");
        }
    }

    /// An exported decoder, and the bytes of each of its initialisers with its type.
    struct Exported {
        folder: tempfile::TempDir,
        tensors: BTreeMap<String, (DataType, Vec<u8>)>,
    }

    impl Exported {
        fn new(checkpoint: &Path, options: &ExportOptions) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let bundle = folder.path().join("bundle");
            export(checkpoint, &bundle, options).unwrap();
            let (model, _) = read_model(&bundle.join("decoder.onnx")).unwrap();
            let data = std::fs::read(bundle.join("decoder.onnx.data")).unwrap();
            let bytes = |tensor: &TensorProto| match &tensor.raw_data {
                Some(bytes) => bytes.clone(),
                None => {
                    let number = |key: &str| -> usize {
                        let entry = tensor.external_data.iter().find(|entry| entry.key.as_deref() == Some(key));
                        entry.unwrap().value.as_deref().unwrap().parse().unwrap()
                    };
                    data[number("offset")..][..number("length")].to_vec()
                }
            };
            let tensor = |tensor: &TensorProto| {
                let data_type = DataType::from_onnx(tensor.data_type.unwrap()).unwrap();
                (tensor.name.clone().unwrap(), (data_type, bytes(tensor)))
            };
            Self { tensors: model.graph.unwrap().initializer.iter().map(tensor).collect(), folder }
        }

        fn scale(&self, name: &str) -> f16 {
            let (data_type, bytes) = &self.tensors[name];
            assert_eq!(*data_type, DataType::F16);
            f16::from_le_bytes(bytes.as_slice().try_into().unwrap())
        }
    }

    fn test_checkpoint(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/checkpoints").join(name)
    }

    fn options() -> ExportOptions {
        ExportOptions { precision: Precision::Fp8, target: Target::TensorRt, ..ExportOptions::default() }
    }

    #[test]
    fn activations_have_the_scales_that_calibration_saw_and_weights_their_own() {
        let values = positive_values();
        for name in ["published-f16", "biases-bf16", "head24-llama3-rope-bf16"] {
            let folder = test_checkpoint(name);
            let exported = Exported::new(&folder, &options());
            let checkpoint = Checkpoint::open(&folder, None, None).unwrap();
            let config = LlavaConfig::read(&checkpoint).unwrap().decoder;
            let stats = calibrate::run(&checkpoint, &config, &Windows::random(&config), &|| Ok(())).unwrap();
            for (layer, stats) in stats.iter().enumerate() {
                let sites = [
                    ("self_attn.qkv_proj", &stats.attention_input),
                    ("self_attn.o_proj", &stats.attention_output),
                    ("mlp", &stats.mlp_input),
                    ("mlp.down_proj", &stats.mlp_hidden),
                ];
                for (site, stats) in sites {
                    let scale = exported.scale(&format!("layers.{layer}.{site}.input_scale"));
                    assert_eq!(scale, f16::from_f32(stats.largest / MAX), "{name} layer {layer} {site}");
                    assert!(stats.largest.powi(2) >= stats.mean_square.iter().copied().fold(0.0, f32::max));
                }
                let (hidden, wide) = (config.hidden_size, config.intermediate_size);
                for (site, shape) in
                    [("gate_proj", [wide, hidden]), ("up_proj", [wide, hidden]), ("down_proj", [hidden, wide])]
                {
                    let site = format!("layers.{layer}.mlp.{site}.weight");
                    let stored = checkpoint.tensor(Part::Decoder, &site, &shape).unwrap().read_f32().unwrap();
                    let scale = exported.scale(&format!("{site}_scale"));
                    let largest = stored.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                    assert_eq!(scale, f16::from_f32(largest / MAX).max(f16::MIN_POSITIVE), "{name} {site}");
                    let (data_type, codes) = &exported.tensors[&format!("{site}_quantized")];
                    assert_eq!((*data_type, codes.len()), (DataType::F8E4M3, stored.len()));
                    for (code, value) in codes.iter().zip(&stored) {
                        let magnitude = values[usize::from(code & 0x7f)] * scale.to_f32();
                        let found = if code & 0x80 == 0 { magnitude } else { -magnitude };
                        // Half a step: of 8 to a power of two, or of 2^-9.
                        let most = (value.abs() / 16.0).max(scale.to_f32() * 2.0_f32.powi(-10));
                        assert!((found - value).abs() <= 1.001 * most, "{name} {site}: {found}, expected {value}");
                    }
                }
            }
            let (data_type, _) = &exported.tensors["embed_tokens.weight"];
            assert_eq!(*data_type, DataType::F16);
        }
    }

    #[test]
    fn a_bundle_is_as_the_lint_and_its_manifest_say() {
        let exported = Exported::new(&test_checkpoint("published-f16"), &options());
        let bundle = exported.folder.path().join("bundle");
        let manifest = BundleManifest::read(&bundle).unwrap();
        let header = manifest.header();
        assert_eq!((header.precision, header.vision_precision), (Precision::Fp8, Precision::Fp16));
        assert_eq!(header.activations, DataType::F16);
        assert_eq!(check_bundle(&bundle, &manifest).unwrap(), []);
        for (name, graph) in manifest.named_graphs() {
            let contents = GraphContents::read(&bundle, &manifest, graph).unwrap();
            let is_decoder = name == "decoder";
            assert_eq!(contents.weight_bytes.contains_key("f8e4m3"), is_decoder, "{name}");
            assert_eq!(contents.ops.contains_key("QuantizeLinear"), is_decoder, "{name}");
        }
    }

    #[test]
    fn what_does_not_go_with_fp8_is_refused_with_a_hint() {
        let refusal = |options: &ExportOptions, checkpoint: &Path| {
            let folder = tempfile::tempdir().unwrap();
            let error = export(checkpoint, &folder.path().join("bundle"), options).expect_err("refused");
            assert!(error.hint().is_some() && std::fs::read_dir(folder.path()).unwrap().next().is_none());
            error.to_string()
        };
        let checkpoint = test_checkpoint("published-f16");
        let clip = test_checkpoint("../clip/gelu-f16");
        let with = |change: &dyn Fn(&mut ExportOptions)| {
            let mut options = options();
            change(&mut options);
            refusal(&options, &checkpoint)
        };
        assert_eq!(
            with(&|options| options.target = Target::Ort),
            "--precision fp8 is not supported: with --target ort"
        );
        assert_eq!(
            with(&|options| options.calibration = Calibration::None),
            "--calibration none is not supported: with --precision fp8"
        );
        assert_eq!(
            with(&|options| options.vision_precision = Some(Precision::Fp8)),
            "--vision-precision fp8 is not supported: for a vision tower"
        );
        assert_eq!(
            with(&|options| options.activations = Some(Precision::Fp32)),
            "--activations fp32 is not supported: with --precision fp8"
        );
        assert_eq!(refusal(&options(), &clip), "--precision fp8 is not supported: with a CLIP checkpoint");
    }

    #[test]
    fn a_scale_brings_the_largest_to_the_end_and_is_never_zero() {
        assert_eq!(scale(448.0), Some(f16::ONE));
        assert_eq!(scale(7.0), Some(f16::from_f32(0.015_625)));
        assert_eq!(scale(0.0), Some(f16::MIN_POSITIVE));
        assert_eq!(scale(1e-3), Some(f16::MIN_POSITIVE));
        assert_eq!((scale(f32::NAN), scale(f32::INFINITY), scale(65_505.0)), (None, None, None));
        let largest = scale(65_504.0).unwrap();
        assert_eq!(largest, MAX_SCALE);
        assert!(f16::from_f32(largest.to_f32() * MAX).is_finite());
        assert!(f16::from_f32(f16::from_f32(largest.to_f32().next_up() + 0.1).to_f32() * MAX).is_infinite());
        let mut data = Vec::new();
        encode(scale(0.0).unwrap().to_f32(), &[0.0, -0.0], &mut data);
        encode(2.0, &[896.0, -1e9, 2.0], &mut data);
        assert_eq!(data, [0, 0x80, 0x7e, 0xfe, 0x38]);
    }
}
