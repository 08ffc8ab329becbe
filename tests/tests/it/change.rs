//! Changes of a running target, on real sockets and threads: each is answered soon, and a host that
//! has nothing to do with it notices nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::ram::RamVolume;
use block::{Identity, Volume};
use it::faults::host;
use it::process;
use it::rig::{Rig, SUBNQN};
use it::wire::{self, Connect, Digests, Init};
use nvme::spec::Nqn;
use nvmf_target::{AnaState, Limits, NamespaceConfig, SubsystemConfig};

use crate::faults::witness;

const ROUNDS: u8 = 25;

fn ram(n: u8) -> Arc<dyn Volume> {
    Arc::new(RamVolume::new(Identity::from_uuid([n; 16]), 8 << 20, 512).expect("memory"))
}

/// A host that writes namespace 2 for as long as it may.
fn victim(rig: &Rig) -> std::io::Result<u64> {
    let connect = Connect::new(SUBNQN, &host("victim"));
    let (mut admin, cntlid) = connect.admin(rig.addr, Init::default())?;
    admin.command(wire::number_of_queues(1), &[], &[])?.ok()?;
    let mut queue = connect.io(rig.addr, Init::default(), cntlid, 1)?;
    let mut done = 0;
    loop {
        let mut write = wire::io_sqe(1, 2, done % 64 * 16, 16, 8192);
        if done % 2 == 1 {
            wire::sgl(&mut write, 0x01, 0, 8192);
            if queue.command(write, &[7; 8192], &[])?.ok().is_err() {
                return Ok(done);
            }
        } else if queue.command(write, &[], &[7; 8192])?.ok().is_err() {
            return Ok(done);
        }
        done += 1;
    }
}

#[test]
fn changes_are_answered_under_load_and_the_others_notice_nothing() {
    let rig = Rig::start(vec![ram(1)], 2, Limits::default()).expect("a target");
    let stop = AtomicBool::new(false);
    let target = &rig.target;
    let nqn = |name: &str| Nqn::new(host(name).as_str()).expect("well formed");
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| {
        let innocents = [0, 1].map(|nth| {
            let (stop, addr) = (&stop, rig.addr);
            scope.spawn(move || witness(addr, nth, Digests::ALL[nth as usize], stop))
        });
        let mut timed = |change: &mut dyn FnMut()| {
            let begun = Instant::now();
            change();
            slowest = slowest.max(begun.elapsed());
        };
        for n in 0..ROUNDS {
            let volume = ram(2 + n);
            let mut namespace = NamespaceConfig::new(2, Arc::clone(&volume));
            namespace.hosts = Some(vec![nqn("victim")]);
            timed(&mut || target.attach(SUBNQN, namespace.clone()).expect("attached"));
            drop(namespace);
            let victim = scope.spawn(|| victim(&rig));
            process::wait_for(Duration::from_secs(10), || {
                let totals = target.status().controllers;
                Ok(totals.iter().any(|c| c.hostnqn == host("victim") && c.io_queues == 1))
            })
            .expect("the victim is there");
            timed(&mut || target.refresh(SUBNQN, 2).expect("nothing new"));
            for state in [AnaState::NonOptimized, AnaState::Optimized] {
                timed(&mut || target.set_ana(Some(SUBNQN), 1, 1, state).expect("set"));
            }
            match n % 5 {
                0 => timed(&mut || target.set_write_protect(SUBNQN, 2, true).expect("set")),
                1 => timed(&mut || {
                    target.set_namespace_hosts(SUBNQN, 2, Some(Vec::new())).expect("set");
                }),
                2 => timed(&mut || {
                    target.move_namespace(SUBNQN, 2, 5).expect("moved");
                    target.set_ana(None, 1, 5, AnaState::Inaccessible).expect("set");
                }),
                3 => timed(&mut || target.disconnect_host(None, &nqn("victim")).expect("ended")),
                _ => {}
            }
            timed(&mut || target.detach(SUBNQN, 2).expect("detached"));
            assert_eq!(Arc::strong_count(&volume), 1, "a detached volume is not held");
            // It ends by a status, or by the end of its connection.
            let ended = victim.join().expect("no panic");
            assert!(ended.is_ok() || n % 5 == 3, "{ended:?}");
            let other = SubsystemConfig::new(format!("nqn.2026-11.io.penstock:{n}"), "X");
            timed(&mut || target.add_subsystem(other.clone()).expect("added"));
            timed(&mut || target.remove_subsystem(&other.nqn).expect("removed"));
        }
        stop.store(true, Ordering::Release);
        for innocent in innocents {
            let (rounds, _) = innocent.join().expect("no panic").expect("nothing noticed");
            assert!(rounds > 20, "{rounds}");
        }
    });
    println!("the slowest change took {slowest:?}");
    assert!(slowest < Duration::from_secs(5));
}
