//! What the command line says when something is mistyped, missing or fails: at once, what it is, and what to do.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::support::{demo_bundle, demo_shard, printed_rows, read_json, recaption, root, stderr, write_tar};

/// A refusal is two lines: what is wrong, and what to do. Nothing comes before it and nothing is left behind.
fn assert_refused(args: &[&str], error: &str, hint: &str) {
    let output = recaption(args);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    let lines: Vec<&str> = message.lines().collect();
    let [first, second] = lines[..] else { panic!("{args:?}: {message}") };
    assert!(first.starts_with("error: ") && first.contains(error), "{args:?}: {message}");
    assert!(second.starts_with("hint: ") && second.contains(hint), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?}");
}

#[test]
fn what_is_no_bundle_is_told_apart() {
    let image = root("tests/data/images/42/a.png");
    let (image, checkpoint) = (image.to_str().unwrap(), root("models/demo"));
    let checkpoint = checkpoint.to_str().unwrap();
    let out = tempfile::tempdir().unwrap();
    let profile = out.path().join("profile");
    let profile = profile.to_str().unwrap();
    let missing = "`nope` is not a bundle: there is no such folder";
    assert_refused(&["run", image, "--model", "nope"], missing, "check the path, or make one with `recaption export");
    assert_refused(&["inspect", "nope"], missing, "recaption export");
    assert_refused(&["inspect", "nope", "--verify"], missing, "recaption export");
    assert_refused(&["doctor", "--model", "nope"], missing, "recaption export");
    assert_refused(&["profile", image, "--model", "nope", "--out", profile], missing, "recaption export");
    assert!(!out.path().join("profile").exists());
    assert_refused(&["inspect", image], "it is not a folder", "recaption export");
    let hint = format!("recaption export {checkpoint} --out BUNDLE_DIR");
    assert_refused(&["run", image, "--model", checkpoint], "but a checkpoint's config.json", &hint);
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded() {
    let (bundle, image) = (demo_bundle(), root("tests/data/images/42/a.png"));
    let (bundle, image) = (bundle.to_str().unwrap(), image.to_str().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("notes.txt");
    std::fs::write(&file, "mine").unwrap();
    let (file, below) = (file.to_str().unwrap(), file.join("below"));
    let below = below.to_str().unwrap();
    let hint = "name a folder that you may write to";
    let is_file = format!("cannot write into `{below}`: `{file}` is not a folder");
    for out in ["--out", "--work-dir"] {
        let args = ["run", image, "--model", bundle, "--out", folder.path().to_str().unwrap(), out];
        let args = if out == "--out" { [&args[..4], &args[6..]].concat() } else { args.to_vec() };
        let with = |place: &'static str| [&args[..], &[place]].concat();
        assert_refused(&[&args[..], &[file]].concat(), "it is not a folder", hint);
        assert_refused(&[&args[..], &[below]].concat(), &is_file, hint);
        if cfg!(target_os = "linux") {
            assert_refused(&with("/proc/x"), "cannot write into `/proc/x`: nothing can be made in `/proc`", hint);
        }
    }
    assert_refused(&["profile", image, "--model", bundle, "--out", below], &is_file, hint);
    let checkpoint = root("models/demo");
    let export = ["export", checkpoint.to_str().unwrap(), "--out"];
    assert_refused(&[&export[..], &[below]].concat(), &is_file, hint);
    assert_refused(&[&export[..], &[file]].concat(), "cannot write a bundle to", "choose a name that does not exist");
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["notes.txt"], "nothing is left behind");
}

#[test]
fn flags_that_would_be_ignored_are_refused() {
    let (bundle, image) = (demo_bundle(), root("tests/data/images/42/a.png"));
    let (bundle, image, checkpoint) = (bundle.to_str().unwrap(), image.to_str().unwrap(), root("models/demo"));
    let checkpoint = checkpoint.to_str().unwrap();
    for format in ["parquet", "webdataset"] {
        let args = ["run", image, "--model", bundle, "--format", format];
        assert_refused(&args, &format!("--format {format} makes files"), "add --out DIR");
    }
    // That is what comes out there.
    let args = ["run", image, "--model", bundle, "--format", "jsonl", "--quiet", "--max-new-tokens", "2"];
    assert_eq!(printed_rows(&recaption(&args)).len(), 1);

    for (flag, value) in [("--precision", "int8"), ("--target", "cpu")] {
        let args = ["plan", "--model", bundle, "--device-kind", "h100-sxm", flag, value];
        assert_refused(&args, "is a bundle, which has a precision and a target already", "name the checkpoint");
        let output = recaption(&["plan", "--from", "profile.json", flag, value]);
        assert!(stderr(&output).contains("--model <MODEL>"), "{}", stderr(&output));
    }
    let fp32 = ["plan", "--model", bundle, "--device-kind", "h100-sxm"];
    assert_refused(&fp32, "no fp32 arithmetic", "for a bundle, which has its own, name its checkpoint");
    let args = ["plan", "--model", checkpoint, "--device-kind", "h100-sxm", "--precision", "fp16"];
    assert_eq!(recaption(&args).status.code(), Some(0));

    let out = tempfile::tempdir().unwrap();
    let bundle = out.path().join("bundle");
    let export = ["export", checkpoint, "--out", bundle.to_str().unwrap()];
    let export = |flags: &[&'static str]| [&export[..], flags].concat();
    let nowhere = export(&["--precision", "int8", "--calibration", "nope"]);
    assert_refused(&nowhere, "--calibration `nope`: ", "captions, random, none, or the path of a text file");
    for precision in ["fp32", "fp16", "bf16"] {
        for (flag, value) in [("--rounding", "search"), ("--calibration", "captions"), ("--calibration", "nope")] {
            let error = format!("{flag} is not supported: with --precision {precision}");
            assert_refused(&export(&["--precision", precision, flag, value]), &error, "leave it out: it is for ");
        }
    }
    let int8 = export(&["--precision", "int8", "--rounding", "nearest"]);
    assert_refused(&int8, "--rounding is not supported: with --precision int8", "leave it out: it is for int4");
    // With a use for them, or where nothing is what is learned, it is the next flag that is refused.
    let reduce = "--reduce-range is not supported";
    let int4 = ["--precision", "int4", "--rounding", "nearest", "--calibration", "captions", "--reduce-range"];
    assert_refused(&export(&int4), reduce, "leave it out");
    assert_refused(&export(&["--calibration", "none", "--reduce-range"]), reduce, "leave it out");
    assert_refused(&export(&["--target", "cpu"]), "--precision fp32 is not supported", "add --precision int8");
    let reduced = export(&["--precision", "int4", "--reduce-range"]);
    assert_refused(&reduced, "--reduce-range is not supported: with --precision int4", "leave it out");
    let vision = export(&["--target", "cpu", "--precision", "int8", "--vision-precision", "fp16"]);
    assert_refused(&vision, "--vision-precision fp16 is not supported", "leave it out");
    assert!(!bundle.exists());
}

#[test]
fn numbers_that_mean_nothing_are_refused_in_words() {
    let (limit, device) = ("expected a number of images from 1 on", "expected GPU numbers such as `0` or `0,1`");
    for (flag, value, got, expected, hint) in [
        ("--limit", "0", "0", limit, "leave --limit out to caption all of them"),
        ("--limit", "few", "few", limit, "leave --limit out"),
        ("--device", "x", "x", device, "`recaption doctor` lists the GPUs"),
        ("--device", "0,,1", "", device, "`recaption doctor` lists"),
        ("--device", "-1", "-1", device, "`recaption doctor` lists"),
    ] {
        for command in [&["run"][..], &["profile", "--out", "profile"]] {
            let output = recaption(&[command, &["photos", "--model", "bundle", flag, value]].concat());
            let message = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{message}");
            let lines: Vec<&str> = message.lines().collect();
            assert!(lines[0].starts_with("error: ") && lines[0].contains(flag), "{message}");
            assert!(lines[0].ends_with(&format!("{expected}, got `{got}`")), "{message}");
            assert!(lines[1].starts_with("hint: ") && lines[1].contains(hint), "{message}");
        }
    }
}

#[test]
fn flags_for_gpus_are_refused_on_the_cpu_and_told_of_where_it_is_taken() {
    let (bundle, image, out) = (demo_bundle(), root("tests/data/images/42/a.png"), tempfile::tempdir().unwrap());
    let (bundle, image) = (bundle.to_str().unwrap(), image.to_str().unwrap());
    let profile = out.path().join("profile");
    let fixed = [image, "--model", bundle, "--provider"];
    let flags = [
        &["--device", "1"][..],
        &["--gpu-memory-utilization", "0.9"],
        &["--no-cuda-graphs"],
        &["--engine-cache", "engines"],
    ];
    for flags in flags {
        let error = format!("{} is not supported: with --provider cpu", flags[0]);
        for command in [&["run"][..], &["profile", "--out", profile.to_str().unwrap()]] {
            let args = [command, &fixed, &["cpu"], flags].concat();
            assert_refused(&args, &error, "leave it out: it is for GPUs");
        }
    }
    assert!(!profile.exists());
    if has_driver() {
        return;
    }
    // The same command is for machines with a GPU and without.
    let args = [&["run"][..], &fixed, &["auto", "--device", "0", "--no-cuda-graphs", "--max-new-tokens", "1"]].concat();
    let output = recaption(&args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let told = stderr(&output).lines().nth(1).map(str::to_owned);
    assert_eq!(told.as_deref(), Some("warning: without effect on the CPU: --device, --no-cuda-graphs"));
}

#[test]
fn a_column_of_images_is_refused_where_no_input_has_columns() {
    let (bundle, shard, images) = (demo_bundle(), demo_shard(), root("tests/data/images/42"));
    let image = images.join("a.png");
    let [bundle, shard, images, image] = [&bundle, &shard, &images, &image].map(|path| path.to_str().unwrap());
    let flags = ["--model", bundle, "--image-column", "photo"];
    for inputs in [&[shard][..], &[images], &[image, shard]] {
        let error = "--image-column `photo` is for Parquet files, and none of the inputs is one";
        assert_refused(&[&["run"], inputs, &flags].concat(), error, "leave it out");
    }
    // What is listed may have any name: only then is it told that nothing was.
    let listed = recaption(&[&["run", "-"], &flags[..]].concat());
    assert_eq!(listed.status.code(), Some(1), "{}", stderr(&listed));
    let message = stderr(&listed);
    assert!(message.contains("error: input `-`: standard input named no image"), "{message}");
}

#[test]
fn what_costs_time_or_does_nothing_gets_a_warning() {
    let (bundle, image, out) = (demo_bundle(), root("tests/data/images/42/a.png"), tempfile::tempdir().unwrap());
    let (image, out) = (image.to_str().unwrap(), out.path().to_str().unwrap());
    let run = |flags: &[&str]| {
        let fixed = ["run", image, "--model", bundle.to_str().unwrap(), "--provider", "cpu", "--max-new-tokens", "1"];
        let output = recaption(&[&fixed[..], flags].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stderr(&output)
    };
    let retry = ["--out", out, "--retry-failed"];
    let unknown = format!("warning: --retry-failed: `{out}` has no run whose rows failed; all images are captioned");
    assert!(run(&retry).contains(&unknown));
    assert!(!run(&retry).contains("warning: "));
    let num_cores = std::thread::available_parallelism().unwrap().get();
    let message = run(&["--threads", &(num_cores + 1).to_string()]);
    assert!(message.contains(&format!("warning: --threads {} on {num_cores} core", num_cores + 1)), "{message}");
    assert!(!run(&["--threads", &num_cores.to_string()]).contains("warning: "));
}

#[test]
fn an_empty_prompt_is_refused() {
    let (bundle, image) = (demo_bundle(), root("tests/data/images/42/a.png"));
    let args = ["run", image.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--prompt"];
    for prompt in ["", "  \n"] {
        assert_refused(&[&args[..], &[prompt]].concat(), "the prompt is empty", "leave --prompt out");
    }
}

#[test]
fn folders_without_images_are_refused_before_a_model_is_loaded() {
    let (bundle, image, folder) = (demo_bundle(), root("tests/data/images/42/a.png"), tempfile::tempdir().unwrap());
    let (bundle, image) = (bundle.to_str().unwrap(), image.to_str().unwrap());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir_all(path("empty/a/b")).unwrap();
    std::fs::write(path("empty/a/notes.txt"), "no image").unwrap();
    std::fs::create_dir(path("second")).unwrap();
    let (empty, second, profile) = (path("empty"), path("second"), path("profile"));
    let error = format!("input `{empty}`: no image in it");
    assert_refused(&["run", &empty, &second, "--model", bundle], &error, "images end in .jpg");
    std::fs::write(path("second/00000.tar"), "").unwrap();
    assert_refused(&["run", &second, "--model", bundle], "no image in it, but shards", "name the shards: FOLDER/*.tar");
    assert_refused(&["profile", &empty, "--model", bundle, "--out", &profile], &error, "images end in .jpg");
    // Others are captioned, and the empty one is told at the end.
    let output = recaption(&["run", &empty, image, "--model", bundle, "--max-new-tokens", "1"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains(&error) && printed_rows(&output).len() == 1, "{}", stderr(&output));
}

#[test]
fn an_output_of_something_else_is_refused_before_a_provider_is_looked_for() {
    let (bundle, image, out) = (demo_bundle(), root("tests/data/images/42/a.png"), tempfile::tempdir().unwrap());
    let (bundle, image) = (bundle.to_str().unwrap(), image.to_str().unwrap());
    let flags = [image, "--model", bundle, "--out", out.path().to_str().unwrap()];
    let run = |tokens: &'static str| [&["run"][..], &flags, &["--max-new-tokens", tokens]].concat();
    assert_eq!(recaption(&run("2")).status.code(), Some(0));
    let names = || {
        let entries = std::fs::read_dir(out.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect::<std::collections::BTreeSet<_>>()
    };
    let before = names();
    assert_refused(&run("3"), "was written with other settings: max_new_tokens was 2, now 3", "--overwrite");
    let settings = out.path().join("run.json");
    let whole = std::fs::read(&settings).unwrap();
    std::fs::write(&settings, "x").unwrap();
    assert_refused(&run("2"), "run.json`: it is damaged", "start anew with --overwrite");
    std::fs::write(&settings, whole).unwrap();
    let own = "name a folder of its own for the profile";
    let profile = [&["profile"][..], &flags].concat();
    assert_refused(&profile, "has a run.json: it holds the captions of a run", own);
    assert_eq!(names(), before);
    let profile = ["profile", image, "--model", bundle, "--out", bundle];
    assert_refused(&profile, "has a manifest.json: it holds a bundle", own);
    let shard = out.path().join("captions-images-00000.parquet");
    let whole = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &whole[..whole.len() / 2]).unwrap();
    let output = recaption(&run("2"));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let told = ["captions-images-00000.parquet`: Parquet error", "\nhint: delete it, and the shard is done again"];
    assert!(told.iter().all(|told| stderr(&output).contains(told)), "{}", stderr(&output));
}

#[test]
fn what_is_no_checkpoint_is_told_apart() {
    let (bundle, checkpoint, folder) = (demo_bundle(), root("models/demo"), tempfile::tempdir().unwrap());
    let out = folder.path().join("bundle");
    let config = checkpoint.join("config.json");
    let [bundle, checkpoint, config, out] = [&bundle, &checkpoint, &config, &out].map(|path| path.to_str().unwrap());
    assert_refused(&["export", "nope", "--out", out], "there is no such folder", "check the path");
    assert_refused(&["export", bundle, "--out", out], "has no config.json", "it is a bundle, exported already");
    assert_refused(&["export", config, "--out", out], "config.json`", "give the folder that it is in");
    for precision in ["fp32", "int8"] {
        let args = ["export", checkpoint, "--out", out, "--precision", precision, "--tokenizer", "nope"];
        assert_refused(&args, "`nope` has no tokenizer.json", "--tokenizer takes a tokenizer.json");
    }
    let readme = root("README.md");
    let plan = ["plan", "--device-kind", "h100-sxm", "--model"];
    assert_refused(&[&plan[..], &[readme.to_str().unwrap()]].concat(), "README.md`: ", "check that it is the file");
    assert_refused(&[&plan[..], &["docs"]].concat(), "no bundle, no checkpoint", "name a bundle's folder");
}

#[test]
fn files_of_another_kind_are_refused_with_what_is_read() {
    let bundle = demo_bundle();
    let text = root("README.md");
    let args = ["run", text.to_str().unwrap(), "--model", bundle.to_str().unwrap()];
    for kind in [".jpg", ".bmp", ".tar.gz", ".parquet", "recaption run -"] {
        assert_refused(&args, "not an image, a folder, a tar or a parquet file", kind);
    }
    let bundle = bundle.to_str().unwrap();
    let args = ["run", "shards/*.tar", "--model", bundle];
    assert_refused(&args, "no such file or folder", "patterns are the shell's: leave the quotes out");
    let args = ["run", text.to_str().unwrap(), "--model", bundle, "--out", bundle];
    assert_refused(&args, "it is a bundle", "name a folder of its own");
    assert_refused(&["doctor", "--log-level", "loud"], "`loud` is no level", "use error, warn, info");
    let make = "make one with `recaption profile";
    assert_refused(&["plan", "--from", "nope.json"], "`nope.json`: No such file", make);
    assert_refused(&["plan", "--from", text.to_str().unwrap()], "not a profile", make);
}

fn captioned_lines(output: &Output) -> Vec<String> {
    let is_of_result =
        |line: &&str| ["captioned ", "0 row", "1 row", "2 row"].iter().any(|start| line.starts_with(start));
    stderr(output).lines().filter(is_of_result).map(str::to_owned).collect()
}

#[test]
fn the_last_lines_say_what_became_of_how_many() {
    let (bundle, folder) = (demo_bundle(), tempfile::tempdir().unwrap());
    let run = |inputs: &[&str]| {
        let flags = ["--model", bundle.to_str().unwrap(), "--provider", "cpu", "--max-new-tokens", "2"];
        let lines = captioned_lines(&recaption(&[&["run"], inputs, &flags].concat()));
        // The images may be counted too late for the first of them.
        lines.into_iter().map(|line| line.replacen("/1 (", " (", 1).replacen("/2 (", " (", 1)).collect::<Vec<_>>()
    };
    let broken = folder.path().join("broken.jpg");
    std::fs::write(&broken, "no picture").unwrap();
    let image = root("tests/data/images/42/a.png");
    let (broken, image) = (broken.to_str().unwrap(), image.to_str().unwrap());
    let [progress, summary] = &run(&[broken])[..] else { panic!("two lines") };
    assert_eq!(progress, "captioned 0 (1 failed)");
    assert!(summary.starts_with("1 row: 0 ok, 1 failed; ") && summary.ends_with(" s to run"), "{summary}");
    let [progress, summary] = &run(&[broken, image])[..] else { panic!("two lines") };
    assert!(progress.starts_with("captioned 1 (1 failed), "), "{progress}");
    assert!(summary.starts_with("2 rows: 1 ok, 1 failed; ") && summary.contains(" captioned images/s, "), "{summary}");
    // A failed row is no image that was captioned.
    let out = folder.path().join("out");
    run(&[broken, image, "--out", out.to_str().unwrap()]);
    let summary = read_json(&out.join("summary.json"));
    let [rate, seconds] = ["images_per_second", "run_seconds"].map(|field| summary[field].as_f64().unwrap());
    assert!((rate * seconds - 1.0).abs() < 1e-6, "{summary}");
    // A tar that ends before its first image: nothing was done, at no rate.
    let cut = folder.path().join("cut.tar");
    write_tar(&cut, &[("a.jpg".to_owned(), std::fs::read(image).unwrap())]);
    std::fs::OpenOptions::new().write(true).open(&cut).unwrap().set_len(700).unwrap();
    let lines = run(&[cut.to_str().unwrap()]);
    assert!(lines[0].starts_with("captioned 0") && !lines[0].contains("img/s"), "{lines:?}");
    assert!(lines[1].starts_with("0 rows: 0 ok, 0 failed; ") && lines[1].ends_with(" s to run"), "{lines:?}");
}

#[test]
fn a_line_of_standard_input_that_names_no_file_says_so_in_its_row() {
    let bundle = demo_bundle();
    let mut child = Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", "-", "--model", bundle.to_str().unwrap()])
        .current_dir(root("tests"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"no-such.png\ndata\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let rows = printed_rows(&output);
    let errors: Vec<&str> = rows.iter().map(|row| row["error"].as_str().unwrap()).collect();
    assert_eq!(errors, ["source: there is no file `no-such.png`", "source: `data` is a folder, not a file"]);
    let message = stderr(&output);
    assert!(message.contains("captioned 0 (2 failed)\n"), "{message}");
    assert!(message.contains("failed: 1 × source: there is no file `…`"), "{message}");
}

fn has_driver() -> bool {
    ["/dev/nvidiactl", "/dev/dxg"].iter().any(|device| std::path::Path::new(device).exists())
}

#[test]
fn without_a_driver_the_first_line_says_that_and_nothing_of_cuda() {
    if has_driver() {
        return;
    }
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let (bundle, shard) = (bundle.to_str().unwrap(), shard.to_str().unwrap());
    let output = recaption(&["run", shard, "--model", bundle, "--limit", "1", "--max-new-tokens", "1"]);
    assert_eq!(stderr(&output).lines().next(), Some("provider: cpu (no NVIDIA driver)"));
    let refused = recaption(&["run", shard, "--model", bundle, "--provider", "cuda"]);
    let message = stderr(&refused);
    assert!(message.contains("hint: install the NVIDIA driver; "), "{message}");
    let doctor = recaption(&["doctor", "--model", bundle]);
    let text = String::from_utf8(doctor.stdout).unwrap();
    assert!(text.contains("auto takes     provider: cpu (no NVIDIA driver)"), "{text}");
    assert!(text.contains("hint: install the NVIDIA driver; "), "{text}");
    // The way out for 8 bits is one that works.
    assert!(!text.contains("no VNNI") || text.contains("--precision int8 --target cpu"), "{text}");
}
