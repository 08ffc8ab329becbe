//! Commands that are followed, to see where their time goes.

use nvmf_target::{Stage, Taken, Tls};

use crate::rig::{BLOCK, Rig};
use crate::tls;

const SMALL: usize = 8 * BLOCK;
/// More than a capsule takes: the target asks for it.
const LARGE: usize = 128 * BLOCK;

fn ns(taken: &Taken, stage: Stage) -> u64 {
    taken.ns[stage as usize]
}

/// So many writes of both sizes, and reads of what they wrote.
fn load(rig: &mut Rig, rounds: u64) {
    let host = rig.host(1, 1);
    for round in 0..rounds {
        for len in [SMALL, LARGE] {
            let bytes: Vec<u8> = (0..len).map(|n| (n as u64 * 3 + round) as u8).collect();
            rig.write(&host.io[0], round * 256, &bytes);
            assert!(rig.read(&host.io[0], round * 256, len) == bytes, "bytes differ");
        }
    }
    host.admin.cut();
    rig.until("the end", || host.io[0].is_over());
}

#[test]
fn followed_commands_are_counted_by_stage_and_none_is_without_being_asked() {
    let mut rig = Rig::new(1);
    load(&mut rig, 2);
    let nothing = rig.target.breakdown();
    assert_eq!((nothing.every, nothing.reads.requests, nothing.writes.requests), (0, 0, 0));

    rig.target.set_sampling(1);
    load(&mut rig, 5);
    let found = rig.target.breakdown();
    // One at a time, and all are followed.
    assert_eq!((found.every, found.reads.requests, found.writes.requests), (1, 10, 10));
    for taken in [&found.reads, &found.writes] {
        for stage in [Stage::Receive, Stage::Parse, Stage::Queue, Stage::Backend, Stage::Send] {
            assert!(ns(taken, stage) > 0, "{stage:?} took nothing: {found:?}");
        }
        assert_eq!(ns(taken, Stage::Decrypt) + ns(taken, Stage::Encrypt), 0, "{found:?}");
    }
    assert_eq!(ns(&found.reads, Stage::Data), 0, "reads bring no data");
    assert!(ns(&found.writes, Stage::Data) > 0);

    rig.target.set_sampling(0);
    load(&mut rig, 2);
    let after = rig.target.breakdown();
    assert_eq!((after.reads, after.writes), (found.reads, found.writes));
}

#[test]
fn one_in_so_many_is_followed() {
    let mut rig = Rig::new(2);
    rig.target.set_sampling(4);
    load(&mut rig, 6);
    // 24 commands, reads and writes in turn.
    let found = rig.target.breakdown();
    assert_eq!(found.reads.requests + found.writes.requests, 6, "{found:?}");
}

#[test]
fn records_are_told_apart_from_the_socket() {
    let (mut rig, _keys) = tls::rig(Tls::Required);
    rig.target.set_sampling(1);
    load(&mut rig, 3);
    let found = rig.target.breakdown();
    assert_eq!((found.reads.requests, found.writes.requests), (6, 6));
    for taken in [&found.reads, &found.writes] {
        assert!(ns(taken, Stage::Decrypt) > 0 && ns(taken, Stage::Encrypt) > 0, "{found:?}");
    }
}
