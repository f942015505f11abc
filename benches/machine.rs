//! Owns what benches say about the machine they run on, and what it says about this process. Knows
//! no models.

use std::fs;

use slipstream_model::kernels::Isa;

/// Processor, cores, memory and instruction set in one line.
#[must_use]
pub fn describe() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let name = field("model name").unwrap_or_else(|| "unknown processor".to_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = kib_of("/proc/meminfo", "MemTotal:").map_or(0, |kib| kib >> 20);
    format!("{name}, {cores} cores, {memory} GiB, {}", Isa::detect().name())
}

/// Memory of this process that is in use, in MiB; NaN where the system does not say.
#[must_use]
pub fn resident_mib() -> f64 {
    kib_of("/proc/self/status", "VmRSS:").map_or(f64::NAN, |kib| kib as f64 / 1024.0)
}

/// The number behind `name` in a file of lines like `VmRSS:   1234 kB`.
fn kib_of(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}
