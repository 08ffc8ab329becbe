//! The last flush: what hosts wrote is durable before the process ends.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context, bail};
use block::{Channel, Io, IoError, Op, Volume};
use reactor::{Local, Progress, Task};

use crate::cores::{self, Cores};

/// A disk that does not flush within this time is reported instead of waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// One flush on one channel.
struct Flush {
    local: Local,
    channel: Box<dyn Channel>,
    io: Option<Box<Io>>,
    answer: mpsc::Sender<(usize, Result<(), IoError>)>,
    index: usize,
    done: bool,
}

impl Task for Flush {
    fn poll(&mut self, _now: Duration) -> Progress {
        if let Some(io) = self.io.take()
            && let Err(block::Busy(io)) = self.channel.submit(io)
        {
            self.io = Some(io);
            return Progress::Idle;
        }
        let (answer, index, done) = (&self.answer, self.index, &mut self.done);
        self.channel.poll(&mut |io| {
            *done = true;
            // The receiver may have lost its patience.
            let _ = answer.send((index, io.result));
        });
        // A disk that does not answer does not hold up the end of the process.
        if self.done || self.local.is_stopping() { Progress::Done } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        self.channel.deadline()
    }
}

/// Flushes every volume that has something to flush, on a core of its own. Blocks.
pub(crate) fn flush_all(volumes: &[(String, Arc<dyn Volume>)]) -> anyhow::Result<()> {
    let cached: Vec<_> =
        volumes.iter().filter(|(_, volume)| volume.geometry().write_cache).collect();
    if cached.is_empty() {
        return Ok(());
    }
    let cores = Cores::start("flush", 1, &cores::core_config(), |_| {})?;
    let (answer, answers) = mpsc::channel();
    for (index, (name, volume)) in cached.iter().enumerate() {
        let volume = volume.clone();
        let answer = answer.clone();
        let started = cores.on(0, move |spawner| {
            let local = spawner.local().clone();
            let channel = volume.open(&local, 1)?;
            let io = Some(Box::new(Io::new(Op::Flush, 0, 0)));
            spawner.spawn(Box::new(Flush { local, channel, io, answer, index, done: false }));
            std::io::Result::Ok(())
        })?;
        started.with_context(|| format!("flushing volume {name:?}"))?;
    }
    drop(answer);
    let mut left = cached.len();
    let mut problems = Vec::new();
    while left > 0 {
        match answers.recv_timeout(PATIENCE) {
            Ok((_, Ok(()))) => {}
            Ok((index, Err(error))) => {
                problems.push(format!("flushing volume {:?}: {error}", cached[index].0));
            }
            Err(_) => {
                problems.push(format!("{left} volumes gave no answer to the last flush"));
                break;
            }
        }
        left -= 1;
    }
    if problems.is_empty() { Ok(()) } else { bail!("{}", problems.join("; ")) }
}
