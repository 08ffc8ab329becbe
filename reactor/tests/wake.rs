//! The wake-up protocol, in every order that threads and memory allow.

use std::sync::Arc;

use loom::sync::Notify;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

/// What `wake.rs` finds in its parent.
mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicU32, Ordering};
}

#[allow(dead_code, reason = "a part of the library")]
#[path = "../src/wake.rs"]
mod flag;

use flag::WakeFlag;

/// The core's loop: looks for work, sleeps when there is none. A wake-up that is lost is a deadlock,
/// which loom reports; so is work that is not seen after the notice of it was taken.
fn run_core(flag: &WakeFlag, eventfd: &Notify, work: &AtomicU32, expected: u32) {
    loop {
        flag.take();
        // Relaxed: the flag alone must order it.
        if work.load(Ordering::Relaxed) == expected {
            return;
        }
        if flag.try_sleep() {
            eventfd.wait();
            flag.woke();
        }
    }
}

#[test]
fn no_wake_up_is_lost() {
    // All orders for one notifier; for two, those with up to two preemptions, as all take minutes.
    for (notifiers, preemption_bound) in [(1, None), (2, Some(2))] {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = preemption_bound;
        model.check(move || {
            let flag = Arc::new(WakeFlag::default());
            let eventfd = Arc::new(Notify::new());
            let work = Arc::new(AtomicU32::new(0));
            let threads: Vec<_> = (0..notifiers)
                .map(|_| {
                    let (flag, eventfd, work) = (flag.clone(), eventfd.clone(), work.clone());
                    thread::spawn(move || {
                        work.fetch_add(1, Ordering::Relaxed);
                        if flag.notify() {
                            eventfd.notify();
                        }
                    })
                })
                .collect();
            run_core(&flag, &eventfd, &work, notifiers);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }
}

#[test]
fn a_notice_before_sleep_keeps_the_core_awake() {
    loom::model(|| {
        let flag = WakeFlag::default();
        assert!(!flag.notify(), "an awake core needs no signal");
        assert!(!flag.try_sleep());
        assert!(flag.take());
        assert!(!flag.take());
        assert!(flag.try_sleep());
        assert!(flag.notify(), "a sleeping core needs one");
        assert!(!flag.notify(), "and only one");
        flag.woke();
        assert!(flag.take());
    });
}

#[test]
fn waking_without_a_notice_leaves_none() {
    loom::model(|| {
        let flag = WakeFlag::default();
        assert!(flag.try_sleep());
        flag.woke();
        assert!(!flag.take());
        assert!(flag.try_sleep());
    });
}
