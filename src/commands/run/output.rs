//! The output folder before a run: whose it is, what is deleted in it, and what is noted there.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use recaption_export::hex;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::cli::RunArgs;
use crate::commands::run::SUMMARY_FILE;
use crate::error::{Error, Result};
use crate::pipeline::write::OutputOptions;
use crate::pipeline::write::claim::OutputLock;
use crate::pipeline::write::output::is_output_file;
use crate::pipeline::write::{create_folder, write_new};

const SETTINGS_FILE: &str = "run.json";
const LOCK_FILE: &str = "run.lock";

/// What the pipeline is told of the output folder.
pub(super) fn options(folder: &Path, args: &RunArgs, settings: &Value) -> Result<OutputOptions> {
    // Several outputs may have one work folder.
    let work_folder = match &args.work_dir {
        Some(work_folder) => {
            let path = std::path::absolute(folder).map_err(Error::io("find", folder))?;
            Some(work_folder.join(&fingerprint(&path.to_string_lossy())[..16]))
        }
        None => None,
    };
    Ok(OutputOptions {
        folder: folder.to_owned(),
        format: args.format.into(),
        work_folder,
        settings: fingerprint(&settings["settings"].to_string()),
        sync_interval: Duration::from_secs_f64(args.sync_interval),
        retry_failed: args.retry_failed,
        has_claims: !args.no_claims,
    })
}

fn fingerprint(text: &str) -> String {
    hex(&Sha256::digest(text))
}

/// Checks that the output folder, if there is one, belongs to a run with the same settings.
pub(super) fn check(folder: &Path, settings: &Value, overwrite: bool) -> Result<()> {
    let path = folder.join(SETTINGS_FILE);
    if overwrite || !path.is_file() {
        return Ok(());
    }
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let earlier: Value = serde_json::from_slice(&text).unwrap_or_default();
    let differences = differences(&earlier["settings"], &settings["settings"]);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::OtherRun { path: folder.to_owned(), differences: differences.join("; ") })
}

/// Makes the output folder, empties it if asked to, and notes the settings in it, all of which other processes may be
/// doing at the same time. The folder is shared with them as long as the lock is held.
pub(super) fn prepare(options: &OutputOptions, settings: &Value, overwrite: bool) -> Result<Option<OutputLock>> {
    let folder = &options.folder;
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    if let Some(work_folder) = &options.work_folder {
        std::fs::create_dir_all(work_folder).map_err(Error::io("create", work_folder))?;
    }
    let path = folder.join(SETTINGS_FILE);
    // Without settings the folder is not a run's: what lies in it is somebody else's.
    let empty = || if path.is_file() { delete_output(options) } else { Ok(()) };
    let lock_path = folder.join(LOCK_FILE);
    let lock = match (options.has_claims, overwrite) {
        (true, true) => Some(OutputLock::share_after(&lock_path, empty)?),
        (true, false) => Some(OutputLock::share(&lock_path, || delete_leftovers(options))?),
        (false, true) => empty().map(|()| None)?,
        (false, false) => None,
    };
    create_folder(&options.journal_folder())?;
    let text = serde_json::to_vec_pretty(settings).expect("bug: JSON serialises");
    if path.is_file() || !write_new(&path, &text)? {
        check(folder, settings, false)?;
    }
    Ok(lock)
}

/// Deletes what runs write: captions, then what was in progress.
fn delete_output(options: &OutputOptions) -> Result<()> {
    delete_in(&options.folder, &|path| {
        let name = path.file_name().unwrap_or_default();
        is_output_file(path) || name == SUMMARY_FILE
    })?;
    let has_extension = |extensions: &'static [&'static str]| {
        move |path: &Path| path.extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension))
    };
    delete_in(&options.journal_folder(), &has_extension(&["journal", "new"]))?;
    delete_in(&options.stats_folder(), &has_extension(&["json", "tmp"]))?;
    delete_in(&options.claim_folder(), &has_extension(&["lock"]))?;
    // Last: until then the folder is still known for a run's.
    let path = options.folder.join(SETTINGS_FILE);
    std::fs::remove_file(&path).map_err(Error::io("delete", &path))
}

/// Deletes files in the making that killed processes left.
fn delete_leftovers(options: &OutputOptions) -> Result<()> {
    delete_in(&options.folder, &|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_ours = ["captions-", SETTINGS_FILE, SUMMARY_FILE].iter().any(|start| name.starts_with(start));
        is_ours && name.ends_with(".tmp")
    })?;
    delete_in(&options.journal_folder(), &|path| path.extension().is_some_and(|extension| extension == "new"))
}

fn delete_in(folder: &Path, is_ours: &dyn Fn(&Path) -> bool) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if is_ours(&path) && path.is_file() {
            std::fs::remove_file(&path).map_err(Error::io("delete", &path))?;
        }
    }
    Ok(())
}

/// `name: was X, now Y` for each setting that differs.
fn differences(earlier: &Value, now: &Value) -> Vec<String> {
    let empty = serde_json::Map::new();
    let (earlier, now) = (earlier.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let names: BTreeMap<&String, ()> = earlier.keys().chain(now.keys()).map(|name| (name, ())).collect();
    let shown = |value: Option<&Value>| value.map_or("unset".to_owned(), ToString::to_string);
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
            [r#"format was "parquet", now unset"#, r#"prompt was "a", now "b""#, r#"template was unset, now "x""#]
        );
    }
}
