//! A plan as text: who, where, how fast, how long, and where the time goes as bars.

use super::texts;
use crate::commands::inspect::numbers::{bytes, counted, flops};
use crate::console::printable;
use crate::plan::{Basis, Job, Plan};

/// Columns of the longest bar.
const BAR_WIDTH: f64 = 40.0;
/// Columns of what stands before numbers.
const LABEL_WIDTH: usize = 46;

/// The plan, with a line break at its end.
pub(super) fn render(plan: &Plan, price: Option<f64>) -> String {
    let mut sections = vec![facts(plan), speeds(plan), split(plan)];
    sections.extend(plan.job.map(|job| self::job(plan, &job, price)));
    sections.push(cores(plan));
    sections.push(basis(&plan.basis));
    sections.join("\n")
}

fn facts(plan: &Plan) -> String {
    let (model, device, memory, image) = (&plan.model, &plan.device, &plan.memory, &plan.image);
    let mut rates = vec![format!("{}/s {}", flops(plan_rate(plan) as u64), plan.decoder_arithmetic.name())];
    rates.push(format!("{}/s", bytes(device.bytes_per_second as u64)));
    rates.push(bytes(device.memory_bytes));
    let engines = if plan.num_engines == 1 { String::new() } else { format!("{} engines, each: ", plan.num_engines) };
    let rows = [
        (
            "captioner",
            format!(
                "{}, {} for target {}: {} of vision, {} of decoder",
                printable(&model.name),
                model.precision.name(),
                model.target.name(),
                bytes(model.vision_bytes),
                bytes(model.decoder_bytes)
            ),
        ),
        ("device", format!("{}: {} ({})", printable(&device.kind), rates.join(", "), printable(&device.source))),
        (
            "memory",
            format!(
                "{engines}{} in flight, {} at once; weights {} + slots of {} + workspace {} = {} of {}",
                counted(memory.num_slots as u64, "caption"),
                counted(memory.vision_batch as u64, "image"),
                bytes(memory.weight_bytes),
                bytes(memory.bytes_per_slot),
                bytes(memory.workspace_bytes),
                bytes(memory.total_bytes),
                bytes(memory.budget_bytes)
            ),
        ),
        (
            "image",
            format!(
                "{} image + {} prompt + {} new tokens, {}",
                image.image_tokens,
                image.prompt_tokens,
                short(image.new_tokens),
                flops(image.flops.total)
            ),
        ),
    ];
    rows.map(|(name, text)| format!("{name:<9}  {text}\n")).concat()
}

/// Operations per second of the decoder's arithmetic.
fn plan_rate(plan: &Plan) -> f64 {
    plan.decoder_arithmetic.rate(&plan.device).unwrap_or_default()
}

fn speeds(plan: &Plan) -> String {
    let rate = plan.steady.images_per_second;
    let tokens = rate.map(|rate| rate * plan.image.new_tokens);
    let title = "one device, once its slots are full";
    [heading(title), row("images/s", texts(rate, amount)), row("new tokens/s", texts(tokens, amount))].concat()
}

fn split(plan: &Plan) -> String {
    let split = plan.steady.split;
    let stages = [
        ("vision", split.vision),
        ("projector", split.projector),
        ("prefill", split.prefill),
        ("decode", split.decode),
        ("waiting", split.idle),
    ];
    let bars = stages.into_iter().filter(|&(name, share)| name != "waiting" || share > 0.0005).map(|(name, share)| {
        format!("  {name:<9}  {:>5.1} %  {}", 100.0 * share, bar(share)).trim_end().to_owned() + "\n"
    });
    let milliseconds = 1e3 * plan.steady.step_seconds;
    let used = 100.0 * plan.steady.utilisation;
    let title = format!(
        "where its time goes (likely): a decode step takes {} ms, all together use {used:.0} % of peak arithmetic\n",
        short(milliseconds)
    );
    title + &bars.collect::<String>()
}

fn job(plan: &Plan, job: &Job, price: Option<f64>) -> String {
    let devices = match plan.num_devices {
        1 => "one device".to_owned(),
        devices => format!("{} devices", grouped(devices as f64)),
    };
    let mut text = heading(&format!("{} images on {devices}", grouped(job.num_images)));
    if plan.num_devices > 1 {
        text += &row("images/s", texts(job.images_per_second, amount));
    }
    text += &row("time", texts(job.hours, duration));
    text += &row("device-hours", texts(job.device_hours, amount));
    if let Some((cost, price)) = job.cost.zip(price) {
        text += &row(&format!("cost, at {} an hour", short(price)), texts(cost, amount));
    }
    text
}

fn cores(plan: &Plan) -> String {
    let needed = &plan.preprocessing;
    let per_image = needed.seconds_per_image.likely * 1e3;
    let given = match needed.num_cores {
        Some(cores) => format!("; it has {}", short(cores)),
        None => String::new(),
    };
    format!(
        "cores that a device keeps busy with reading and resizing: {} (likely), at {} ms an image{given}\n",
        short(needed.cores_per_device.likely),
        short(per_image)
    )
}

fn basis(basis: &Basis) -> String {
    match basis {
        Basis::Assumed { assumptions } => {
            let rows = assumptions.iter().map(|assumption| {
                let value = |value: f64| match assumption.unit {
                    "share" => format!("{:.0} %", 100.0 * value),
                    _ => format!("{} ms", short(1e3 * value)),
                };
                row(assumption.name, texts(assumption.range, value))
            });
            heading("assumed, see docs/planning.md") + &rows.collect::<String>()
        }
        Basis::Profile { machine, model, spread, .. } => format!(
            "scaled from a profile of {} on {}; slow and fast are {:.0} % off\n",
            printable(model),
            printable(machine),
            100.0 * spread
        ),
    }
}

fn heading(title: &str) -> String {
    format!("{title:<LABEL_WIDTH$}  {:>10}  {:>10}  {:>10}\n", "slow", "likely", "fast")
}

fn row(label: &str, [slow, likely, fast]: [String; 3]) -> String {
    format!("  {label:<width$}  {slow:>10}  {likely:>10}  {fast:>10}\n", width = LABEL_WIDTH - 2)
}

/// Full blocks and an eighth of one.
fn bar(share: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * BAR_WIDTH * 8.0).round() as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

/// Three digits, or whole numbers in groups.
fn amount(value: f64) -> String {
    if value < 1000.0 { short(value) } else { grouped(value) }
}

/// `44.6`, `0.31`, `120`
fn short(value: f64) -> String {
    let decimals = match value {
        value if value == value.trunc() || value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.1 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// `22,855`
fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let first = digits.len() % 3;
    let mut text = digits[..first].to_owned();
    for (i, digit) in digits[first..].chars().enumerate() {
        if i % 3 == 0 && !text.is_empty() {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `15.8 h`, `12 min`, `9.3 days`
fn duration(hours: f64) -> String {
    match hours {
        hours if hours >= 72.0 => format!("{} days", short(hours / 24.0)),
        hours if hours >= 1.0 => format!("{} h", short(hours)),
        hours if hours >= 1.0 / 60.0 => format!("{} min", short(hours * 60.0)),
        hours => format!("{} s", short(hours * 3600.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::assumptions::Range;

    #[test]
    fn numbers_and_bars_read_well() {
        assert_eq!([0.0, 12.0, 999.0, 1000.0, 1_234_567.0].map(grouped), ["0", "12", "999", "1,000", "1,234,567"]);
        assert_eq!([0.0312, 0.31, 4.456, 44.64, 120.4].map(short), ["0.031", "0.31", "4.46", "44.6", "120"]);
        assert_eq!([0.001, 0.5, 15.83, 240.0].map(duration), ["3.60 s", "30 min", "15.8 h", "10 days"]);
        assert_eq!([0.0, 0.5, 1.0].map(|share| bar(share).chars().count()), [0, 20, 40]);
        assert_eq!(Range::of([1.0, 2.0, 3.0]).map(|value| 2.0 * value).values(), [2.0, 4.0, 6.0]);
    }
}
