//! Standard error: lines for people, log events, and the progress bar, which do not tear each other. What inputs say (names,
//! reasons) cannot steer a terminal from here. With `--log-format json` every line is one JSON object.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::ProgressBar;
use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// The target of the lines for people, where they are log events: shown whatever the level.
const LINES: &str = "recaption::console";
/// What is logged where nobody says: what goes wrong. ONNX Runtime warns of what export has decided.
const DEFAULT_FILTER: &str = "warn,ort=error";

static IS_JSON: AtomicBool = AtomicBool::new(false);
/// The bar on the terminal's last line.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Sends log events to standard error from here on. `level` is a level, for this program's own events, or directives as of
/// `tracing`'s `EnvFilter`.
///
/// # Errors
/// When `level` is neither.
pub fn start_logging(level: Option<&str>, format: LogFormat) -> Result<(), String> {
    let directives = match level.map(str::trim) {
        None | Some("") => DEFAULT_FILTER.to_owned(),
        Some(level) if level.parse::<tracing::Level>().is_ok() || level == "off" => {
            format!("{DEFAULT_FILTER},recaption={level},recaption_export={level}")
        }
        // To the filter it is the name of a module, all of whose events are wanted.
        Some(word) if word.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
            return Err(format!("`{word}` is no level"));
        }
        Some(directives) => directives.to_owned(),
    };
    let is_json = format == LogFormat::Json;
    let filter = EnvFilter::try_new(if is_json { format!("{directives},{LINES}=info") } else { directives });
    let filter = filter.map_err(|error| error.to_string())?;
    IS_JSON.store(is_json, Ordering::Relaxed);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Events).with_ansi(false);
    // A log that somebody else has set up is as good.
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
    };
    Ok(())
}

/// Whether a bar may be drawn.
pub(crate) fn is_terminal() -> bool {
    !IS_JSON.load(Ordering::Relaxed) && io::stderr().is_terminal()
}

/// Puts a bar on the last line, or takes it away.
pub(crate) fn set_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
}

/// One line, or several, for people. Whether anybody reads it is not the program's concern.
pub(crate) fn print_line(line: &str) {
    match IS_JSON.load(Ordering::Relaxed) {
        true => tracing::info!(target: LINES, "{line}"),
        false => write(&printable_lines(line)),
    }
}

/// `warning: …`, on one line.
pub(crate) fn print_warning(warning: &str) {
    match IS_JSON.load(Ordering::Relaxed) {
        true => tracing::warn!(target: LINES, "{warning}"),
        false => write(&format!("warning: {}\n", printable(warning))),
    }
}

/// `error: …`, and what to do, on a line each.
pub fn print_error(error: &str, hint: Option<&str>) {
    match (IS_JSON.load(Ordering::Relaxed), hint) {
        (true, _) => tracing::error!(target: LINES, hint, "{error}"),
        (false, None) => write(&format!("error: {}\n", printable(error))),
        (false, Some(hint)) => write(&format!("error: {}\nhint: {}\n", printable(error), printable(hint))),
    }
}

/// A text without what would steer a terminal, line breaks included: `\u{1b}` for an escape.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    match text.chars().any(is_control) {
        false => Cow::Borrowed(text),
        true => Cow::Owned(escaped(text, is_control)),
    }
}

/// As [`printable`], of a text whose line breaks are meant.
fn printable_lines(text: &str) -> String {
    let mut text = escaped(text, |character| character != '\n' && is_control(character));
    text.push('\n');
    text
}

fn escaped(text: &str, is_bad: impl Fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        match is_bad(character) {
            // Four digits, so that it is an escape within JSON too.
            true => {
                let _ = write!(safe, "\\u{:04x}", u32::from(character));
            }
            false => safe.push(character),
        }
    }
    safe
}

/// What a terminal obeys instead of showing it: control characters of both sets, and those that turn the direction of writing.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Writes whole lines above the bar.
fn write(text: &str) {
    let bar = BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let write = || {
        let mut stderr = io::stderr().lock();
        let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    };
    match &*bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// Where `tracing` writes: each event comes whole, as one line.
struct Events;

impl Write for Events {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        write(&format!("{}\n", printable(text.trim_end_matches('\n'))));
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_spelled_out() {
        assert_eq!(printable("a plain naïve 名前.jpg"), "a plain naïve 名前.jpg");
        assert_eq!(printable("\u{1b}[2J\u{7}\r\n"), r"\u001b[2J\u0007\u000d\u000a");
        assert_eq!(printable("\u{9b}31m\u{202e}gpj.exe"), r"\u009b31m\u202egpj.exe");
        assert_eq!(printable_lines("a\u{1b}c\nb"), "a\\u001bc\nb\n");
        let json = format!("\"{}\"", printable("\u{9b}"));
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), "\u{9b}", "still the same within JSON");
    }
}
