//! The files and `expected.json` are torch's own: see scripts/golden/make_torch_files.py.

use std::path::PathBuf;

use serde_json::Value as Json;

use super::*;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/torch_file");

/// A state dict of one f32 tensor `w` on storage `0` of two elements, up to its offset.
const TENSOR_HEAD: &[u8] = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage\
    ctorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ";
/// The rest of it, from after the strides: no gradient, no hooks.
const TENSOR_TAIL: &[u8] = b"\x89NtRs.";

fn load(name: &str) -> Vec<u8> {
    std::fs::read(PathBuf::from(FOLDER).join(name)).unwrap()
}

fn read_named(name: &str) -> Result<Vec<TorchTensor>, TorchFileError> {
    read(&load(name), Path::new(name))
}

fn expected() -> Vec<Json> {
    serde_json::from_slice(&load("expected.json")).unwrap()
}

fn good_files() -> Vec<String> {
    let names = |group: &Json| group["files"].as_array().unwrap().clone();
    expected().iter().flat_map(names).map(|name| name.as_str().unwrap().to_owned()).collect()
}

fn all_files() -> Vec<String> {
    let entries = std::fs::read_dir(FOLDER).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".pt"));
    names.sort();
    names
}

/// A zip of stored entries under `a/`, each 64 bytes plus its names beyond the content.
fn archive(records: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in records {
        let name = format!("a/{name}");
        let sizes = [(content.len() as u32).to_le_bytes(); 2].concat();
        let lengths = [name.len() as u8, 0, 0, 0];
        let at = file.len() as u32;
        file.extend([b"PK\x03\x04".as_slice(), &[0; 14], &sizes, &lengths, name.as_bytes(), content].concat());
        directory.extend([b"PK\x01\x02".as_slice(), &[0; 16], &sizes, &lengths, &[0; 10], &at.to_le_bytes()].concat());
        directory.extend(name.as_bytes());
    }
    let (start, size) = (file.len() as u32, directory.len() as u32);
    let count = [records.len() as u8, 0, records.len() as u8, 0];
    let end = [b"PK\x05\x06".as_slice(), &[0; 4], &count, &size.to_le_bytes(), &start.to_le_bytes(), &[0; 2]].concat();
    [file, directory, end].concat()
}

/// Reads an archive of this pickle and a storage `0` of two elements.
fn read_pickle(pickle: &[u8]) -> Result<Vec<TorchTensor>, TorchFileError> {
    read(&archive(&[("data/0", &[0; 8]), ("data.pkl", pickle)]), Path::new("made.pt"))
}

fn message_of(pickle: &[u8]) -> String {
    read_pickle(pickle).unwrap_err().to_string()
}

/// Reads one tensor whose offset, shape and strides are these opcodes.
fn read_view(view: &[u8]) -> Result<Vec<TorchTensor>, TorchFileError> {
    read_pickle(&[TENSOR_HEAD, view, TENSOR_TAIL].concat())
}

#[test]
fn reads_what_torch_reads() {
    for group in expected() {
        for name in group["files"].as_array().unwrap() {
            let name = name.as_str().unwrap();
            let file = load(name);
            let found: Vec<Json> = read(&file, Path::new(name))
                .unwrap()
                .into_iter()
                .map(|tensor| {
                    let bytes: String = file[tensor.range].iter().map(|byte| format!("{byte:02x}")).collect();
                    let dtype = format!("{:?}", tensor.dtype);
                    serde_json::json!({"name": tensor.name, "dtype": dtype, "shape": tensor.shape, "bytes": bytes})
                })
                .collect();
            assert_eq!(group["tensors"], Json::Array(found), "{name}");
        }
    }
}

#[test]
fn tied_tensors_share_their_bytes() {
    for name in ["tied.pt", "tied_legacy.pt"] {
        let tensors = read_named(name).unwrap();
        assert_eq!((tensors.len(), &tensors[0].range), (2, &tensors[1].range), "{name}");
    }
}

#[test]
fn refuses_what_is_not_plain_tensors_by_name() {
    let refused = [
        ("os_system.pt", ": expected only tensors, got the Python object `posix.system`"),
        ("os_system_protocol_4.pt", ": expected only tensors, got the Python object `posix.system`"),
        ("os_system_legacy.pt", ": expected only tensors, got the Python object `posix.system`"),
        ("os_system_attribute.pt", ": expected only tensors, got the Python object `posix.system`"),
        ("getattr.pt", ": expected only tensors, got the Python object `__builtin__.getattr`"),
        ("attrgetter.pt", ": expected only tensors, got the Python object `operator.attrgetter`"),
        ("whole_module.pt", ": expected only tensors, got the Python object `torch.nn.modules.activation.ReLU`"),
        ("float8.pt", ": expected only tensors, got the Python object `torch._utils._rebuild_tensor_v3`"),
        ("sparse.pt", ": expected only tensors, got the Python object `torch._utils._rebuild_sparse_tensor`"),
        ("set.pt", ": expected only tensors, got pickle opcode EMPTY_SET (0x8f) at byte 183 of the pickle"),
        ("negated.pt", ": tensor `weight`: expected stored values, got a view that negates or conjugates them"),
        ("transposed.pt", ": tensor `weight` of shape [3, 2]: expected contiguous strides [2, 1], got [1, 3]"),
        ("transposed_legacy.pt", ": tensor `weight` of shape [3, 2]: expected contiguous strides [2, 1], got [1, 3]"),
        ("expanded.pt", ": tensor `weight` of shape [3]: expected contiguous strides [1], got [0]"),
        ("single_tensor.pt", ": expected a dict of tensors, got a single tensor"),
        ("no_tensors.pt", ": expected a dict of tensors, got a dict of `epoch`, `state_dict`"),
        ("two_models.pt", ": expected one dict of tensors, got several: `model`, `state_dict`"),
        (
            "tensors_beside_dict.pt",
            ": expected one dict of tensors, got several: the outer one, and that under `other`",
        ),
        ("numbered.pt", ": expected a dict of tensors, got a tensor under a key that is not a string"),
        ("big_endian.pt", ": expected byte order `little`, got `big`"),
        ("missing_storage.pt", ": tensor `weight`: the file has no storage `0`"),
        ("short_storage.pt", ": tensor `weight`: expected storage `0` of 6 elements, got 5"),
        ("not_a_pickle.pt", " is damaged: at byte 0 of the pickle: expected a pickle of protocol 2 to 5"),
        ("two_pickles.pt", " is damaged: data.pkl goes on for 6 bytes after its end"),
        ("no_pickle.pt", ": expected a file that `torch.save` wrote, got a zip without exactly one data.pkl"),
        ("plain_pickle.pt", ": expected a file that `torch.save` wrote, got a plain pickle"),
        (
            "compressed.pt",
            ": entry `archive/.data/serialization_id`: expected to be stored uncompressed, got zip method 8",
        ),
        (
            "torchscript.pt",
            ": expected a state dict, got a TorchScript archive \
             (it has `archive/code/__torch__/torch/nn/functional.py`)",
        ),
    ];
    for (name, reason) in refused {
        let error = read_named(name).unwrap_err();
        assert_eq!(error.to_string(), format!("`{name}`{reason}"));
        assert!(!error.hint().is_empty());
    }
    assert_eq!(refused.len() + good_files().len(), all_files().len(), "every file is tested");
}

#[test]
fn no_part_of_a_file_passes_for_the_whole() {
    for name in all_files() {
        let mut file = load(&name);
        for length in 0..file.len() {
            assert!(read(&file[..length], Path::new(&name)).is_err(), "{length} bytes of {name}");
        }
        file.push(0);
        assert!(read(&file, Path::new(&name)).is_err(), "a byte after {name}");
    }
}

#[test]
fn views_must_lie_within_their_storage() {
    let whole = read_view(b"K\0K\x02\x85K\x01\x85").unwrap();
    assert_eq!((whole[0].shape.as_slice(), whole[0].range.len()), ([2].as_slice(), 8));
    let last = read_view(b"K\x01K\x01\x85K\x01\x85").unwrap();
    assert_eq!(last[0].range, whole[0].range.start + 4..whole[0].range.end);
    // A scalar, by a shape of no sizes.
    assert_eq!(read_view(b"K\x01))").unwrap()[0], TorchTensor { shape: vec![], ..last[0].clone() });

    let message = |view: &[u8]| read_view(view).unwrap_err().to_string();
    let prefix = "`made.pt`: tensor `w`: ";
    assert_eq!(
        message(b"K\x01K\x02\x85K\x01\x85"),
        format!("{prefix}shape [2] from element 1 exceeds its storage of 2 elements")
    );
    // Offset i64::MAX: the end does not overflow.
    assert_eq!(
        message(b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x02\x85K\x01\x85"),
        format!("{prefix}shape [2] from element 9223372036854775807 exceeds its storage of 2 elements")
    );
    // 2^32 x 2^32 elements: the product overflows to none.
    assert_eq!(
        message(b"K\0\x8a\x05\0\0\0\0\x01\x8a\x05\0\0\0\0\x01\x86\x8a\x05\0\0\0\0\x01K\x01\x86"),
        format!("{prefix}shape [4294967296, 4294967296] from element 0 exceeds its storage of 2 elements")
    );
    // 2^62 x 0 elements: none, whatever the other sizes and the strides.
    let none = read_view(b"K\0\x8a\x08\0\0\0\0\0\0\0\x40K\0\x86K\x07K\x09\x86").unwrap();
    assert_eq!((none[0].shape.as_slice(), none[0].range.len()), ([1 << 62, 0].as_slice(), 0));
    assert_eq!(
        message(b"K\0J\xff\xff\xff\xff\x85K\x01\x85"),
        format!("{prefix}expected sizes and strides that are integers from 0")
    );
    assert_eq!(message(b"K\0K\x02\x85)"), format!("{prefix}expected 1 strides, got 0"));
    let (nine, none) = (b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t".as_slice(), b")".as_slice());
    assert_eq!(message(&[b"K\0", nine, none].concat()), format!("{prefix}expected at most 8 dimensions, got 9"));
    assert!(message(b"J\xff\xff\xff\xffK\x02\x85K\x01\x85").ends_with("a tensor's offset is negative"));
}

#[test]
fn a_name_cannot_stand_twice() {
    // {"w": tensor, "w": 1}
    let twice = [TENSOR_HEAD, b"K\0K\x02\x85K\x01\x85\x89NtRsX\x01\0\0\0wK\x01s."].concat();
    assert_eq!(message_of(&twice), "`made.pt`: tensor `w` is there twice");
    let pickle = [TENSOR_HEAD, b"K\0K\x02\x85K\x01\x85", TENSOR_TAIL].concat();
    let file = archive(&[("data.pkl", &pickle), ("data/0", &[0; 8]), ("data/0", &[1; 8])]);
    let message = read(&file, Path::new("made.pt")).unwrap_err().to_string();
    assert_eq!(message, "`made.pt` is damaged: zip entry `a/data/0` is there twice");
}

#[test]
fn messages_show_no_control_characters() {
    let message = message_of(b"\x80\x02cevil\x1b[2J\n\x07name\n.");
    assert_eq!(message, "`made.pt`: expected only tensors, got the Python object `evil\u{fffd}[2J.\u{fffd}name`");
    let long = [b"\x80\x02c".as_slice(), &[b'm'; 5000], b"\nn\n."].concat();
    assert!(message_of(&long).len() < 250);
}

#[test]
fn numbers_that_the_pickle_does_not_back_are_refused() {
    for claim in [
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.".as_slice(), // BINUNICODE8
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",            // BINBYTES8
        b"\x80\x04X\xff\xff\xff\xff.",                               // BINUNICODE
        b"\x80\x04\x8b\xff\xff\xff\x7f.",                            // LONG4
        b"\x80\x04cmodule without end",
    ] {
        assert!(message_of(claim).ends_with("it ends early"), "{}", message_of(claim));
    }
    // A memo index is no length.
    assert!(message_of(b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.").ends_with("got something else"));
    assert!(message_of(b"\x80\x02h\x07.").ends_with("no memo 7"));
    let id = b"\x80\x02((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x01\0\0\0cJ\xff\xff\xff\xfftQ.";
    assert!(message_of(id).ends_with("storage `0` has a negative length"));
}

#[test]
fn broken_stacks_are_refused() {
    for opcodes in [".", "0", "1", "2", "t", "e", "a", "s", "u", "R", "b", "Q", "(.", "N(0", "N(2", "}(Nu", "N(\u{1}a"]
    {
        assert!(message_of(&[b"\x80\x02", opcodes.as_bytes()].concat()).starts_with("`made.pt`"), "{opcodes:?}");
    }
    // An OrderedDict takes no arguments, and a list has no attributes.
    assert!(message_of(b"\x80\x02ccollections\nOrderedDict\n]\x85R.").ends_with("unexpected arguments of OrderedDict"));
    assert!(message_of(b"\x80\x02]}b.").ends_with("expected attributes of an OrderedDict only"));
}

#[test]
fn cycles_and_deep_nests_are_harmless() {
    // A list that holds itself, then a dict that is its own `model`.
    assert!(message_of(b"\x80\x02]q\0h\0a.").ends_with("got something else"));
    let own_model = b"\x80\x02}q\0X\x05\0\0\0modelh\0s.";
    assert!(message_of(own_model).ends_with("expected a dict of tensors, got a dict of `model`"));
    for opcode in [b"\x85".as_slice(), b"(", b"]", b"}", b"2", b"\x94", b"]\x94"] {
        let deep = [b"\x80\x04N".as_slice(), &opcode.repeat(200_000), b"."].concat();
        assert!(read_pickle(&deep).is_err());
    }
}

#[test]
fn long_pickles_are_refused_before_they_cost_memory() {
    let long = [b"\x80\x02".as_slice(), &vec![b'N'; pickle_bytes::MAX_BYTES], b"."].concat();
    assert!(matches!(read_pickle(&long), Err(TorchFileError::PickleTooLong { max: pickle_bytes::MAX_BYTES, .. })));
    assert!(matches!(read(&long, Path::new("a")), Err(TorchFileError::PickleTooLong { .. })));
}

/// Whatever becomes of a file, it is refused or its tensors lie within it.
#[test]
fn damaged_files_never_panic() {
    const ROUNDS_PER_FILE: usize = 10_000;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    // xorshift64
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut num_accepted = 0;
    for name in all_files() {
        let file = load(&name);
        // Half of the damage goes where the structure is densest.
        let entries = zip::entries(&file, Path::new(&name)).unwrap_or_default();
        let pickle = entries.get("archive/data.pkl").map_or(0..file.len(), |entry| entry.range.clone());
        for _ in 0..ROUNDS_PER_FILE {
            let mut damaged = file.clone();
            for _ in 0..=random(3) {
                let range = if random(2) == 0 { pickle.clone() } else { 0..file.len() };
                let at = range.start + random(range.len().max(1));
                match random(4) {
                    0 => damaged[at] = random(256) as u8,
                    1 => damaged[at] ^= 1 << random(8),
                    // An opcode or a length from elsewhere.
                    2 => damaged[at] = file[pickle.start + random(pickle.len().max(1))],
                    _ => damaged[at] = [0, 0xff, 0x7f, 0x80][random(4)],
                }
            }
            let Ok(tensors) = read(&damaged, Path::new(&name)) else { continue };
            num_accepted += 1;
            for tensor in tensors {
                let bytes = damaged.get(tensor.range).unwrap();
                assert_eq!(bytes.len(), tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8);
            }
        }
    }
    // Damage to weights and padding goes unseen, so both outcomes must have been met.
    assert!((1000..all_files().len() * ROUNDS_PER_FILE / 2).contains(&num_accepted), "{num_accepted}");
}
