//! What the SMART log says beside what is counted per I/O: power-on time and temperature.

use std::path::Path;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::config::PowerHistory;
use crate::target::Shared;
use crate::temperature;

/// How old a temperature may be before it is read anew.
const TEMPERATURE_SECONDS: u64 = 30;

/// See the module's documentation. Relaxed throughout: numbers for people.
#[derive(Debug)]
pub(crate) struct Vitals {
    /// What was before this start.
    history: PowerHistory,
    /// A core's clock when the first of them began to serve.
    started: OnceLock<Duration>,
    temperature_kelvin: AtomicU16,
    /// When the temperature was read last, in seconds of the cores' clock.
    read_at: AtomicU64,
}

impl Vitals {
    /// Blocks for the sensors.
    pub(crate) fn new(history: PowerHistory) -> Vitals {
        Vitals {
            history,
            started: OnceLock::new(),
            temperature_kelvin: AtomicU16::new(temperature::read(Path::new("/sys"))),
            read_at: AtomicU64::new(0),
        }
    }

    /// A core begins to serve.
    pub(crate) fn start(&self, now: Duration) {
        self.started.get_or_init(|| now);
    }

    /// The history up to now.
    pub(crate) fn power(&self, now: Duration) -> PowerHistory {
        let since = self.started.get().map_or(Duration::ZERO, |start| now.saturating_sub(*start));
        PowerHistory { power_on: self.history.power_on.saturating_add(since), ..self.history }
    }

    /// The temperature as last read; has it read again, by the control thread, if that is a while
    /// ago.
    pub(crate) fn temperature_kelvin(shared: &Arc<Shared>, now: Duration) -> u16 {
        let vitals = &shared.vitals;
        let (then, now) = (vitals.read_at.load(Ordering::Relaxed), now.as_secs());
        let is_old = now.saturating_sub(then) >= TEMPERATURE_SECONDS;
        // One of the cores that see this at the same time has it done.
        let swap = |at: &AtomicU64| {
            at.compare_exchange(then, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        };
        if is_old && swap(&vitals.read_at) {
            let of = Arc::downgrade(shared);
            shared.jobs.run(move || {
                let found = temperature::read(Path::new("/sys"));
                if let Some(shared) = of.upgrade() {
                    shared.vitals.temperature_kelvin.store(found, Ordering::Relaxed);
                }
            });
        }
        vitals.temperature_kelvin.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_on_time_goes_on_from_the_last_start() {
        let seconds = Duration::from_secs;
        let history =
            PowerHistory { power_cycles: 3, power_on: seconds(1000), unsafe_shutdowns: 2 };
        let vitals = Vitals::new(history);
        assert_eq!(vitals.power(seconds(77)), history, "nobody serves yet");
        vitals.start(seconds(100));
        vitals.start(seconds(120));
        assert_eq!(vitals.power(seconds(150)).power_on, seconds(1050));
        assert_eq!(vitals.power(seconds(150)).unsafe_shutdowns, 2);
    }
}
