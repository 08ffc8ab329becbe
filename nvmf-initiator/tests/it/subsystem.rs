//! Which namespaces a subsystem has, and what a controller says of its media.

use std::sync::Arc;
use std::time::Duration;

use block::Volume;
use nvme::ctrl::HealthCounters;
use nvme::spec::critical_warning;
use nvmf_initiator::{Phase, RemoteConfig, RemoteSubsystem};

use crate::fake::{SUBNQN, Script, namespace};
use crate::rig::{Rig, Setup, TARGET, nqn};

const SECOND: Duration = Duration::from_secs(1);

/// A target that a host may have several associations with.
fn setup() -> Setup {
    Setup { script: Script { fences: false, ..Script::default() }, ..Setup::default() }
}

fn second() -> std::net::SocketAddr {
    ([10, 0, 0, 2], 4420).into()
}

/// The subsystem has these namespaces from now on.
fn attach(rig: &Rig, nsids: &[u32]) {
    let subsys = rig.fake.subsys.borrow().as_ref().clone();
    let namespaces = nsids.iter().map(|nsid| {
        let mut info = namespace(1024);
        info.nsid = *nsid;
        (info.uuid[0], info.nguid[0]) = (*nsid as u8, *nsid as u8);
        info
    });
    let subsys = subsys.with_namespaces(namespaces.collect()).unwrap();
    *rig.fake.subsys.borrow_mut() = Arc::new(subsys);
    rig.cores[TARGET].handle().wake();
}

fn start(rig: &mut Rig, paths: &[std::net::SocketAddr]) -> Arc<RemoteSubsystem> {
    let host = (nqn("nqn.2025-01.io.example:host"), [7; 16]);
    let config = RemoteConfig {
        paths: paths.iter().map(|addr| (*addr).into()).collect(),
        ..RemoteConfig::new(rig.fake.addr, nqn(SUBNQN), 1, host)
    };
    let (subsystem, task) = RemoteSubsystem::start(config, &rig.cores[1].local()).unwrap();
    rig.cores[1].spawn(task);
    subsystem
}

fn until(rig: &mut Rig, subsystem: &RemoteSubsystem, nsids: &[u32]) {
    rig.until(&format!("namespaces {nsids:?}"), |_| {
        subsystem.state().attached.as_deref() == Some(nsids)
    });
}

#[test]
fn namespaces_are_known_and_followed() {
    let mut rig = setup().start();
    rig.until_live();
    let addr = rig.fake.addr;
    let subsystem = start(&mut rig, &[addr]);
    assert_eq!(subsystem.state().attached, None, "nobody has been asked");
    until(&mut rig, &subsystem, &[1]);
    assert_eq!(subsystem.state().phase, Phase::Live);
    for nsids in [&[1, 3][..], &[1, 2, 3, 200], &[], &[7], &[1]] {
        attach(&rig, nsids);
        let begin = rig.world.now();
        until(&mut rig, &subsystem, nsids);
        assert!(rig.world.now() - begin < SECOND, "by the event, not by looking");
    }
    assert_eq!(rig.fake.seen.get().io_connects, 0, "there are no I/O queues");
    // It is asked again after a loss.
    rig.fake.stop(&rig.cores[TARGET]);
    rig.run_for(20 * SECOND);
    assert_eq!(subsystem.state().phase, Phase::Connecting);
    assert_eq!(subsystem.state().attached.as_deref(), Some(&[1][..]), "what was said last counts");
    attach(&rig, &[1, 4]);
    rig.fake.restart(&rig.cores[TARGET]);
    until(&mut rig, &subsystem, &[1, 4]);
    let shutdowns = rig.fake.seen.get().shutdowns;
    subsystem.shutdown();
    rig.until("the end", |_| subsystem.wait_stopped(Duration::ZERO));
    assert_eq!(rig.fake.seen.get().shutdowns, shutdowns + 1);
}

#[test]
fn a_lost_path_takes_no_namespace_with_it_and_hides_no_detached_one() {
    let mut rig = setup().start();
    rig.until_live();
    let addr = rig.fake.addr;
    // Nobody listens at the second one yet.
    let subsystem = start(&mut rig, &[addr, second()]);
    attach(&rig, &[1, 2]);
    until(&mut rig, &subsystem, &[1, 2]);
    rig.fake.listen_at(second(), &rig.cores[TARGET]);
    rig.until("both paths", |_| subsystem.state().paths.iter().all(|path| path.is_live));
    assert_eq!(subsystem.state().attached.as_deref(), Some(&[1, 2][..]));
    rig.fake.stop(&rig.cores[TARGET]);
    rig.until("no path", |_| subsystem.state().paths.iter().all(|path| !path.is_live));
    assert_eq!(subsystem.state().attached.as_deref(), Some(&[1, 2][..]));
    attach(&rig, &[1]);
    // The second path alone comes back, and says that 2 is detached.
    until(&mut rig, &subsystem, &[1]);
    assert!(!subsystem.state().paths[0].is_live);
}

#[test]
fn wear_is_known_where_the_controller_knows_it() {
    let mut rig = setup().start();
    rig.until_live();
    rig.run_for(2 * SECOND);
    // What targets in software say: all spare there, no threshold, nothing used.
    assert_eq!(rig.volume.wear(), None);
    let (generation, health) = (rig.volume.generation(), HealthCounters::default());
    let tell = |rig: &Rig, health: HealthCounters| {
        rig.fake.health.set(health);
        rig.cores[TARGET].handle().wake();
    };
    let worn = HealthCounters {
        percentage_used: 42,
        available_spare_percent: 77,
        available_spare_threshold_percent: 10,
        ..health
    };
    tell(&rig, worn);
    let begin = rig.world.now();
    rig.until("wear", |volume| volume.wear().is_some());
    assert!(rig.world.now() - begin <= 61 * SECOND, "asked every minute");
    let wear = rig.volume.wear().unwrap();
    assert_eq!((wear.percentage_used, wear.spare_percent), (42, 77));
    assert_eq!((wear.spare_threshold_percent, wear.critical_warning), (10, 0));
    assert_eq!(rig.volume.generation(), generation + 1);
    // A warning is told at once; the temperature is not the media's wear.
    let warning = critical_warning::SPARE;
    let health = HealthCounters {
        critical_warning: warning,
        available_spare_percent: 9,
        temperature_kelvin: 1000,
        ..worn
    };
    rig.run_for(5 * SECOND);
    tell(&rig, health);
    let begin = rig.world.now();
    rig.until("the warning", |volume| volume.wear().is_some_and(|wear| wear.spare_percent == 9));
    assert!(rig.world.now() - begin < 3 * SECOND, "by the event");
    assert_eq!(rig.volume.wear().unwrap().critical_warning, warning);
    rig.finish();
}
