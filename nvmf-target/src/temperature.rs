//! The composite temperature of the SMART log: what the machine's own sensors say.
//!
//! A volume does not know which disks it lies on, so that the answer is the machine's: the hottest
//! disk with a sensor, or the hottest other sensor where no disk has one, or 0 ("not reported")
//! where there is none at all, as in most virtual machines. Files of sysfs are read, which may
//! block: for the control thread only.

use std::fs;
use std::path::Path;

/// Drivers of disks' sensors (`name` of a hwmon device).
const DISKS: [&str; 2] = ["nvme", "drivetemp"];

/// Kelvin that a sensor in a working machine can mean; anything else is a sensor that is not there.
const PLAUSIBLE: std::ops::RangeInclusive<i64> = 200..=450;

fn kelvin(millidegrees: &str) -> Option<u16> {
    let celsius: i64 = millidegrees.trim().parse::<i64>().ok()?.div_euclid(1000);
    let kelvin = celsius.checked_add(273)?;
    if PLAUSIBLE.contains(&kelvin) { u16::try_from(kelvin).ok() } else { None }
}

/// Kelvin by the sensors below `sysfs` (`/sys`); 0: there are none.
pub(crate) fn read(sysfs: &Path) -> u16 {
    let (mut disk, mut other) = (0, 0);
    for (class, file) in [("class/hwmon", "temp1_input"), ("class/thermal", "temp")] {
        let Ok(devices) = fs::read_dir(sysfs.join(class)) else { continue };
        for device in devices.flatten() {
            let path = device.path();
            let Ok(text) = fs::read_to_string(path.join(file)) else { continue };
            let Some(found) = kelvin(&text) else { continue };
            let name = fs::read_to_string(path.join("name")).unwrap_or_default();
            let hottest = if DISKS.contains(&name.trim()) { &mut disk } else { &mut other };
            *hottest = found.max(*hottest);
        }
    }
    if disk > 0 { disk } else { other }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sysfs(std::path::PathBuf);

    impl Sysfs {
        fn new(name: &str) -> Sysfs {
            let path = std::env::temp_dir().join(format!("sysfs-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("a folder");
            Sysfs(path)
        }

        fn sensor(&self, device: &str, file: &str, name: Option<&str>, value: &str) {
            let device = self.0.join("class").join(device);
            fs::create_dir_all(&device).expect("a folder");
            fs::write(device.join(file), value).expect("a file");
            if let Some(name) = name {
                fs::write(device.join("name"), format!("{name}\n")).expect("a file");
            }
        }
    }

    impl Drop for Sysfs {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn hottest_disk_before_anything_else() {
        let sysfs = Sysfs::new("disk");
        assert_eq!(read(&sysfs.0), 0, "no sensors");
        sysfs.sensor("thermal/thermal_zone0", "temp", None, "61000\n");
        assert_eq!(read(&sysfs.0), 334);
        sysfs.sensor("hwmon/hwmon0", "temp1_input", Some("coretemp"), "70500\n");
        assert_eq!(read(&sysfs.0), 343);
        sysfs.sensor("hwmon/hwmon1", "temp1_input", Some("nvme"), "38850\n");
        sysfs.sensor("hwmon/hwmon2", "temp1_input", Some("drivetemp"), "41000\n");
        assert_eq!(read(&sysfs.0), 314);
    }

    #[test]
    fn nonsense_is_no_temperature() {
        let sysfs = Sysfs::new("nonsense");
        for (i, value) in
            ["", "warm", "-274000", "-274999999", "9999999999", "1e3"].iter().enumerate()
        {
            sysfs.sensor(&format!("hwmon/hwmon{i}"), "temp1_input", Some("nvme"), value);
        }
        assert_eq!(read(&sysfs.0), 0);
    }
}
