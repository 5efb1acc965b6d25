//! Files of checkpoints and bundles, from anybody.

use std::path::Path;

use recaption_export::fuzzing;

/// Safetensors, or one of torch's two formats when the first byte is odd.
pub fn weights(data: &[u8]) {
    if let Some((kind, file)) = data.split_first() {
        let _ = fuzzing::weights(file, kind % 2 == 1);
    }
}

/// Writes the parts of `data`, which end at a byte of 0, under `names`; a part that is empty is a file that is missing.
fn write_parts(folder: &Path, names: &[&str], data: &[u8]) {
    for (name, part) in names.iter().zip(data.split(|&byte| byte == 0)) {
        if !part.is_empty() {
            std::fs::write(folder.join(name), part).expect("writes");
        }
    }
}

/// The small files of a checkpoint, beside a file of no tensors.
pub fn checkpoint(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let names = [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ];
    std::fs::write(folder.path().join("model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").expect("writes");
    write_parts(folder.path(), &names, data);
    let _ = fuzzing::checkpoint(folder.path());
    let _ = fuzzing::is_clip(folder.path());
}

/// A bundle: its manifest, then a graph under any name that the manifest may give it.
pub fn bundle(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    std::fs::write(folder.path().join("manifest.json"), &data[..end]).expect("writes");
    for name in ["vision_tower.onnx", "projector.onnx", "decoder.onnx"] {
        std::fs::write(folder.path().join(name), data.get(end + 1..).unwrap_or_default()).expect("writes");
    }
    let _ = fuzzing::bundle(folder.path());
}
