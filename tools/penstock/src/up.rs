//! `penstock up`: start everything, prove it, say what to do next, stay.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use daemon::selfcheck::{Figures, Step};
use daemon::size;
use daemon::up::{Up, UpConfig};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::UpArgs;
use crate::signals::{self, Signals};

pub(crate) fn run(args: &UpArgs) -> anyhow::Result<ExitCode> {
    let config = UpConfig {
        data: args.data.clone(),
        listen: args.listen.clone(),
        discovery: args.discovery.clone(),
        size: args.size.clone(),
        self_check: !args.skip_self_check,
    };
    signals::runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let mut up = Up::start(&config)?;
        print!("{}", up.overview());

        // The check blocks and a signal must still be heard.
        let mut check = tokio::task::spawn_blocking(move || {
            let result = up.wait_ready().and_then(|()| check(&mut up));
            (up, result)
        });
        let (up, result) = tokio::select! {
            checked = &mut check => checked?,
            (_, code) = signals.next() => {
                eprintln!("stopped during the self-check");
                std::process::exit(i32::from(code));
            }
        };
        if let Some(figures) = result? {
            println!("self-check {}", describe(&figures));
        }
        for notice in &up.notices {
            println!("note       {notice}");
        }
        print!("{}", up.next_steps());
        if args.check_only {
            let daemon = up.daemon;
            tokio::task::spawn_blocking(move || daemon.stop()).await??;
            return Ok(ExitCode::SUCCESS);
        }
        println!("\nRunning. Ctrl-C stops in order.");
        signals::stay(up.daemon, &mut signals, |text| println!("{text}")).await
    })
}

fn check(up: &mut Up) -> anyhow::Result<Option<Figures>> {
    let style = ProgressStyle::with_template("{prefix:10} {msg:34} [{bar:30}] {percent:>3} %")
        .map_err(|error| anyhow!("the template of the progress bar: {error}"))?;
    let bar = ProgressBar::new(0);
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix("self-check");
    bar.enable_steady_tick(Duration::from_millis(100));
    let mut shown = None;
    let result = up.self_check(&mut |step, done, planned| {
        if shown != Some(step) {
            shown = Some(step);
            bar.set_length(planned);
            bar.set_message(match step {
                Step::ReadingOld => "reading what the last start wrote",
                Step::Writing => "writing a pattern",
                Step::Reading => "reading it back",
                Step::RandomReads => "reading in random order",
            });
        }
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result
}

fn describe(figures: &Figures) -> String {
    format!(
        "{} through device, fabric and volume, every byte right{}\n\
         {:11}write {:.0} MB/s, read {:.0} MB/s (128 KiB, depth 8), {:.0} random 4 KiB reads a \
         second (depth 32)",
        size::show(figures.bytes),
        if figures.found_earlier { "; what the last start wrote was found again" } else { "" },
        "",
        figures.write_bytes_per_s / 1e6,
        figures.read_bytes_per_s / 1e6,
        figures.random_read_iops,
    )
}
