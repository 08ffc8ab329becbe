//! The system calls of an emulator that has started.
//!
//! An allow list: what is not in it fails with `EPERM`, so that a call nobody thought of is an error
//! of one client or one line of the log, and not the end of the process. Arguments are judged where
//! they are values; what lies in memory cannot be.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// Allowed whatever their arguments are.
const ALLOWED: &[i64] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    // Threads: control threads of devices come and go, and whoever waits sleeps.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getcpu,
    libc::SYS_membarrier,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    // Descriptors that are open.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_splice,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // To take the sockets of the devices away; landlock says which.
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    // Connections that are there or come in. Connecting is the rings', which landlock bounds.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Answered by the second filter.
    libc::SYS_clone3,
];

/// What x86-64 has beside the calls that every machine has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_MACHINE: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_MACHINE: &[i64] = &[];

/// Puts the filters on all threads.
pub(super) fn apply() -> Result<(), seccompiler::Error> {
    for program in programs()? {
        seccompiler::apply_filter_all_threads(&program)?;
    }
    Ok(())
}

/// The allow list, and what has to be refused with a code of its own.
fn programs() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let machine = std::env::consts::ARCH.try_into()?;
    let plain = ALLOWED.iter().chain(ALLOWED_MACHINE).map(|call| (*call, Vec::new()));
    let allow = SeccompFilter::new(
        plain.chain(judged()?).collect(),
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        machine,
    )?;
    // Its flags lie in memory. The C library uses `clone` where there is no `clone3`.
    let no_clone3 = SeccompFilter::new(
        [(libc::SYS_clone3, Vec::new())].into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        machine,
    )?;
    Ok([allow.try_into()?, no_clone3.try_into()?])
}

type Rules = Vec<(i64, Vec<SeccompRule>)>;

/// Allowed with some arguments.
fn judged() -> Result<Rules, seccompiler::BackendError> {
    let is = |index, value: i32| {
        SeccompCondition::new(index, Len::Dword, Op::Eq, u64::from(value.cast_unsigned()))
    };
    let any = |index, values: &[i32]| -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        values.iter().map(|value| SeccompRule::new(vec![is(index, *value)?])).collect()
    };
    let thread = libc::CLONE_THREAD as u64;
    let pid = i32::try_from(std::process::id()).unwrap_or(-1);
    let stream = SeccompCondition::new(1, Len::Dword, Op::MaskedEq(0xf), libc::SOCK_STREAM as u64)?;
    Ok(vec![
        // A thread of this process, not a process.
        (
            libc::SYS_clone,
            vec![SeccompRule::new(vec![SeccompCondition::new(
                0,
                Len::Qword,
                Op::MaskedEq(thread),
                thread,
            )?])?],
        ),
        // Signals to itself: how a panic or an assertion ends it.
        (libc::SYS_tgkill, any(0, &[pid])?),
        (libc::SYS_prctl, any(0, &[libc::PR_SET_NAME])?),
        (
            libc::SYS_fcntl,
            any(
                1,
                &[
                    libc::F_GETFD,
                    libc::F_SETFD,
                    libc::F_GETFL,
                    libc::F_SETFL,
                    libc::F_DUPFD_CLOEXEC,
                    libc::F_GET_SEALS,
                    libc::F_ADD_SEALS,
                ],
            )?,
        ),
        (
            libc::SYS_ioctl,
            vec![
                SeccompRule::new(vec![SeccompCondition::new(
                    1,
                    Len::Dword,
                    Op::Eq,
                    libc::FIONBIO,
                )?])?,
                SeccompRule::new(vec![SeccompCondition::new(
                    1,
                    Len::Dword,
                    Op::Eq,
                    libc::FIONREAD,
                )?])?,
            ],
        ),
        // Paths to the targets.
        (
            libc::SYS_socket,
            vec![
                SeccompRule::new(vec![is(0, libc::AF_INET)?, stream.clone()])?,
                SeccompRule::new(vec![is(0, libc::AF_INET6)?, stream])?,
            ],
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_compile_for_this_machine() {
        let [allow, no_clone3] = programs().unwrap();
        assert!(allow.len() > ALLOWED.len());
        assert!(no_clone3.len() > 3);
    }

    #[test]
    fn what_runs_programs_or_looks_into_others_is_in_no_list() {
        let refused = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_openat,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_io_uring_setup,
            libc::SYS_kill,
            libc::SYS_mount,
            libc::SYS_bpf,
        ];
        let judged = judged().unwrap();
        for call in refused {
            assert!(!ALLOWED.contains(&call) && !ALLOWED_MACHINE.contains(&call), "{call}");
            assert!(judged.iter().all(|(other, _)| *other != call), "{call}");
        }
    }
}
