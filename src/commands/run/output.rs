//! The output folder before a run: whose it is, what is deleted in it, and what is noted there.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use recaption_export::{MANIFEST_FILE, hex};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::cli::{FormatArg, RunArgs};
use crate::commands::run::{SETTINGS_FILE, SUMMARY_FILE};
use crate::error::{Error, Result};
use crate::pipeline::write::claim::OutputLock;
use crate::pipeline::write::output::is_output_name;
use crate::pipeline::write::{Format, OutputOptions, create_folder, write_new};
use crate::storage::Location;

const LOCK_FILE: &str = "run.lock";
const MAX_SETTINGS_BYTES: u64 = 16 << 20;

/// The format of the files.
pub(super) fn format(args: &RunArgs) -> Format {
    args.format.unwrap_or(FormatArg::Parquet).into()
}

/// The place that `--out` names, a path or a URL, if rows can be written there: as far as that can be told before anything
/// takes time.
///
/// # Errors
/// [`Error::Setting`] where it is no place for the output, or of a flag that goes with another one.
pub(super) fn place(args: &RunArgs) -> Result<Option<Location>> {
    let Some(out) = &args.out else { return refuse_files(args).map(|()| None) };
    let folder = location(out)?;
    if !folder.is_writable() {
        return Err(Error::Setting {
            reason: format!("--out `{folder}`: web servers are only read from"),
            hint: "use a folder, s3://, gs:// or az://".to_owned(),
        });
    }
    if folder.local_path().is_none() && args.work_dir.is_none() {
        return Err(Error::Setting {
            reason: format!("--out `{folder}` is in an object store, which keeps no journals"),
            hint: "add --work-dir with a folder on a local disk, the same each time".to_owned(),
        });
    }
    for folder in folder.local_path().into_iter().chain(args.work_dir.as_deref()) {
        recaption_export::check_folder(folder)?;
    }
    if folder.local_path().is_some_and(|folder| folder.join(MANIFEST_FILE).is_file()) {
        return Err(Error::Setting {
            reason: format!("--out `{folder}` has a manifest.json: it is a bundle"),
            hint: "name a folder of its own for the captions".to_owned(),
        });
    }
    Ok(Some(folder))
}

/// # Errors
/// [`Error::Setting`] when a format is asked for that standard output does not have.
fn refuse_files(args: &RunArgs) -> Result<()> {
    match format(args) {
        format if args.format.is_none() || format == Format::Jsonl => Ok(()),
        format => Err(Error::Setting {
            reason: format!("--format {} makes files, and there is no --out for them", format.name()),
            hint: "add --out DIR; without it rows go to standard output as JSON Lines".to_owned(),
        }),
    }
}

fn location(out: &Path) -> Result<Location> {
    let Some(text) = out.to_str() else { return Ok(out.into()) };
    Location::parse(text).map_err(|error| Error::Setting {
        reason: format!("--out: {error}"),
        hint: "use a folder, s3://bucket/prefix, gs:// or az://".to_owned(),
    })
}

/// What the pipeline is told of the output folder.
pub(super) fn options(folder: Location, args: &RunArgs, settings: &Value) -> Result<OutputOptions> {
    // Several outputs may have one work folder.
    let work_folder = match &args.work_dir {
        Some(work_folder) => {
            let name = match folder.local_path() {
                Some(path) => {
                    std::path::absolute(path).map_err(Error::io("find", path))?.to_string_lossy().into_owned()
                }
                None => folder.to_string(),
            };
            Some(work_folder.join(&fingerprint(&name)[..16]))
        }
        None => None,
    };
    Ok(OutputOptions {
        folder,
        format: format(args),
        work_folder,
        settings: fingerprint(&settings["settings"].to_string()),
        sync_interval: Duration::from_secs_f64(args.sync_interval),
        retry_failed: args.retry_failed,
        has_claims: !args.no_claims,
        claim_timeout: Duration::from_secs_f64(args.claim_timeout),
    })
}

fn fingerprint(text: &str) -> String {
    hex(&Sha256::digest(text))
}

/// Whether a run has written into the folder before.
pub(super) fn has_run(folder: &Location) -> Result<bool> {
    folder.join(SETTINGS_FILE).exists()
}

/// Checks that the output folder, if there is one, belongs to a run with the same settings.
pub(super) fn check(folder: &Location, settings: &Value, overwrite: bool) -> Result<()> {
    let location = folder.join(SETTINGS_FILE);
    if overwrite || !location.exists()? {
        return Ok(());
    }
    let earlier: Value =
        serde_json::from_slice(&location.read(MAX_SETTINGS_BYTES)?).map_err(|error| Error::Output {
            path: location.to_string().into(),
            reason: format!("it is damaged: {error}"),
            hint: "start anew with --overwrite, or choose another --out".to_owned(),
        })?;
    let differences = differences(&earlier["settings"], &settings["settings"]);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::OtherRun { path: folder.to_string().into(), differences: differences.join("; ") })
}

/// Makes the output folder, empties it if asked to, and notes the settings in it, all of which other processes may be
/// doing at the same time. The folder is shared with them as long as the lock is held.
pub(super) fn prepare(options: &OutputOptions, settings: &Value, overwrite: bool) -> Result<Option<OutputLock>> {
    let location = options.folder.join(SETTINGS_FILE);
    if let Some(work_folder) = &options.work_folder {
        std::fs::create_dir_all(work_folder).map_err(Error::io("create", work_folder))?;
    }
    // Without settings the folder is not a run's: what lies in it is somebody else's.
    let empty = || if location.exists()? { delete_output(options) } else { Ok(()) };
    // Between machines that share an object store there is no lock, only claims.
    let lock_folder = options.folder.local_path().unwrap_or_else(|| options.local_folder());
    std::fs::create_dir_all(lock_folder).map_err(Error::io("create", lock_folder))?;
    let lock_path = lock_folder.join(LOCK_FILE);
    let empty = || refuse_claimed(options).and_then(|()| empty());
    let lock = match (options.has_claims, overwrite) {
        (true, true) => Some(OutputLock::share_after(&lock_path, empty)?),
        (true, false) => Some(OutputLock::share(&lock_path, || delete_leftovers(options))?),
        (false, true) => empty().map(|()| None)?,
        (false, false) => None,
    };
    create_folder(&options.journal_folder())?;
    let text = serde_json::to_vec_pretty(settings).expect("bug: JSON serialises");
    let is_new = !location.exists()?
        && match location.local_path() {
            Some(path) => write_new(path, &text)?,
            None => location.create_exclusive(text)?.is_some(),
        };
    if !is_new {
        check(&options.folder, settings, false)?;
    }
    Ok(lock)
}

/// Refuses to empty an output in an object store that a process on another machine may be working in.
fn refuse_claimed(options: &OutputOptions) -> Result<()> {
    if options.folder.local_path().is_some() || !options.has_claims {
        return Ok(());
    }
    match options.folder.join("claims").names()?.first() {
        Some(claim) => Err(Error::Output {
            path: options.folder.to_string().into(),
            reason: format!("a process is captioning into it, or was killed: it has `claims/{claim}`"),
            hint: "when no process is left, delete what lies below claims/".to_owned(),
        }),
        None => Ok(()),
    }
}

/// Deletes what runs write: captions, then what was in progress.
fn delete_output(options: &OutputOptions) -> Result<()> {
    let delete = |folder: &Location, is_ours: &dyn Fn(&str) -> bool| -> Result<()> {
        let names = folder.names()?;
        names.iter().filter(|name| is_ours(name)).try_for_each(|name| folder.join(name).delete())
    };
    delete(&options.folder, &|name| is_output_name(name) || name == SUMMARY_FILE)?;
    delete(&options.stats_folder(), &|name| name.ends_with(".json") || name.ends_with(".tmp"))?;
    delete(&Location::Local(options.journal_folder()), &|name| {
        [".journal", ".new", ".copy"].iter().any(|suffix| name.ends_with(suffix))
    })?;
    delete(&Location::Local(options.claim_folder()), &|name| name.ends_with(".lock"))?;
    // Last: until then the folder is still known for a run's.
    options.folder.join(SETTINGS_FILE).delete()
}

/// Deletes files in the making that killed processes left.
fn delete_leftovers(options: &OutputOptions) -> Result<()> {
    // An object is whole or not there.
    let names = if options.folder.local_path().is_some() { options.folder.names()? } else { Vec::new() };
    for name in names {
        let is_ours = ["captions-", SETTINGS_FILE, SUMMARY_FILE].iter().any(|start| name.starts_with(start));
        if is_ours && name.ends_with(".tmp") {
            options.folder.join(&name).delete()?;
        }
    }
    let journals = Location::Local(options.journal_folder());
    for name in journals.names()?.iter().filter(|name| name.ends_with(".new") || name.ends_with(".copy")) {
        journals.join(name).delete()?;
    }
    Ok(())
}

/// `name: was X, now Y` for each setting that differs.
fn differences(earlier: &Value, now: &Value) -> Vec<String> {
    let empty = serde_json::Map::new();
    let (earlier, now) = (earlier.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let names: BTreeMap<&String, ()> = earlier.keys().chain(now.keys()).map(|name| (name, ())).collect();
    let shown = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "not given".to_owned(),
        Some(value) => value.to_string(),
    };
    names
        .into_keys()
        .filter(|name| earlier.get(*name) != now.get(*name))
        .map(|name| format!("{name} was {}, now {}", shown(earlier.get(name)), shown(now.get(name))))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_that_differ_are_told_apart_by_name() {
        let earlier = json!({"prompt": "a", "limit": null, "format": "parquet"});
        let now = json!({"prompt": "b", "limit": null, "template": "x"});
        let found = differences(&earlier, &now);
        assert_eq!(
            found,
            [
                r#"format was "parquet", now not given"#,
                r#"prompt was "a", now "b""#,
                r#"template was not given, now "x""#
            ]
        );
    }
}
