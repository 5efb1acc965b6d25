//! The machine that the program runs on: processor, memory, limits. Linux says them in /proc and /sys; elsewhere they are
//! unknown.

use std::path::Path;

/// Bytes that a program may take now: what the system has free, or what is left of this process's control group if that is
/// less.
pub(crate) fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let system = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let system = system.split_whitespace().next()?.parse::<u64>().ok()? * 1024;
    Some(control_group_memory(Path::new("/sys/fs/cgroup")).map_or(system, |group| group.min(system)))
}

/// What a control group (version 2) has left, caches that can be dropped not counted as taken.
fn control_group_memory(folder: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let max = read("memory.max")?.trim().parse::<u64>().ok()?;
    let current = read("memory.current")?.trim().parse::<u64>().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
    Some(max.saturating_sub(current.saturating_sub(cache.unwrap_or(0))))
}

/// Bytes of memory that this process has in use.
pub(crate) fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// How many files may be open at once: the limit in force, and how far the user may raise it.
pub(crate) fn open_files() -> Option<(u64, u64)> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(u64::MAX));
    Some((numbers.next()?, numbers.next()?))
}

/// Nanoseconds that the calling thread has been running.
pub(crate) fn thread_cpu_ns() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    stat.split_whitespace().next()?.parse().ok()
}

/// Seconds that all threads of this process have been running, ended ones too; exact to 10 ms.
pub(crate) fn process_cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    cpu_ticks(&stat).map(|ticks| ticks as f64 / TICKS_PER_SECOND)
}

/// `USER_HZ`: what /proc counts in, on every architecture this runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// User and system time of a line of /proc/PID/stat: fields 14 and 15. The name before may hold anything, also brackets.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some(ticks()? + ticks()?)
}

/// The processor's own name.
pub(crate) fn processor_name() -> Option<String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Instruction sets that matter here, and whether the processor has them.
#[must_use]
pub(crate) fn instruction_sets() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        vec![
            ("avx2", std::is_x86_feature_detected!("avx2")),
            ("fma", std::is_x86_feature_detected!("fma")),
            ("avx512f", std::is_x86_feature_detected!("avx512f")),
            ("avx512-vnni", std::is_x86_feature_detected!("avx512vnni")),
            ("avx-vnni", std::is_x86_feature_detected!("avxvnni")),
            ("avx512-bf16", std::is_x86_feature_detected!("avx512bf16")),
            ("avx512-fp16", std::is_x86_feature_detected!("avx512fp16")),
        ]
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec![
            ("neon", std::arch::is_aarch64_feature_detected!("neon")),
            ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
            ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
            ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        vec![]
    }
}

/// Whether u8 x s8 products are summed in 32 bits here. x86 without VNNI adds pairs of them in 16 bits, which saturate.
pub fn sums_8_bit_products_exactly() -> bool {
    let sets = instruction_sets();
    let has = |name| sets.iter().any(|&(set, is_there)| set == name && is_there);
    !cfg!(target_arch = "x86_64") || has("avx512-vnni") || has("avx-vnni")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_leaves_what_it_has_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(control_group_memory(folder.path()), None);
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        assert_eq!(control_group_memory(folder.path()), None, "no limit");
        write("memory.max", "1000\n");
        assert_eq!(control_group_memory(folder.path()), Some(300));
        write("memory.stat", "anon 400\ninactive_file 250\n");
        assert_eq!(control_group_memory(folder.path()), Some(550));
        write("memory.current", "5000\n");
        assert_eq!(control_group_memory(folder.path()), Some(0));
    }

    #[test]
    fn processor_time_is_read_behind_a_name_with_brackets() {
        let stat = "7 (a) b) R 1 7 7 0 -1 4194560 114 0 0 0 250 31 0 0 20 0 1 0 4 5 6";
        assert_eq!(cpu_ticks(stat), Some(281));
        assert_eq!(cpu_ticks("7"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_how_much_memory_and_how_many_files_there_are() {
        assert!(available_memory().unwrap() > 1 << 20);
        assert!((1 << 20..available_memory().unwrap()).contains(&resident_memory().unwrap()));
        let (soft, hard) = open_files().unwrap();
        assert!(soft > 0 && soft <= hard);
        assert!(processor_name().is_some() || cfg!(not(target_arch = "x86_64")));
    }
}
