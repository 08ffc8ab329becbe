//! Survives a client that truncates the memory it lent.
//!
//! Touching a page of a shared mapping beyond the end of its file raises SIGBUS, and a client can
//! shrink its file at any time. The handler here looks the address up among the registered regions;
//! if one owns it, the whole region is replaced by private zero pages and marked poisoned, and the
//! access is repeated. Any other SIGBUS goes to the handler that was there before.
//!
//! The handler only does atomic loads and one `mmap` system call, so it may run at any instruction.

// UNSAFETY: signal handlers and fixed mappings have no safe form.
#![expect(unsafe_code)]

use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, PoisonError};

/// One registered region. `sequence` is odd while the bounds change, so that the handler never sees
/// half of each. All accesses are SeqCst: this is control path, and the argument stays short.
#[derive(Debug)]
pub(crate) struct Slot {
    sequence: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    poisoned: AtomicBool,
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            sequence: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Only by whoever has the slot: the registry gives it to one region at a time.
    fn set(&self, start: usize, end: usize) {
        self.sequence.fetch_add(1, SeqCst);
        self.start.store(start, SeqCst);
        self.end.store(end, SeqCst);
        self.poisoned.store(false, SeqCst);
        self.sequence.fetch_add(1, SeqCst);
    }

    /// Bounds if `addr` lies in them. A slot that changes meanwhile belongs to another region than
    /// the one being accessed: the accessing thread keeps its own alive.
    fn find(&self, addr: usize) -> Option<(usize, usize)> {
        let before = self.sequence.load(SeqCst);
        let (start, end) = (self.start.load(SeqCst), self.end.load(SeqCst));
        let is_stable = before.is_multiple_of(2) && self.sequence.load(SeqCst) == before;
        (is_stable && start <= addr && addr < end).then_some((start, end))
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(SeqCst)
    }
}

const SLOTS_PER_BLOCK: usize = 64;

/// Slots are never freed, so the handler needs no lock to walk them; they are reused.
struct SlotBlock {
    slots: [Slot; SLOTS_PER_BLOCK],
    next: AtomicPtr<SlotBlock>,
}

impl SlotBlock {
    const fn new() -> SlotBlock {
        SlotBlock {
            slots: [const { Slot::new() }; SLOTS_PER_BLOCK],
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

static FIRST: SlotBlock = SlotBlock::new();

struct Registry {
    installed: bool,
    free: Vec<&'static Slot>,
    last: &'static SlotBlock,
}

static REGISTRY: Mutex<Option<Registry>> = Mutex::new(None);
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Guards `len` bytes at `base`; installs the handler the first time.
pub(crate) fn register(base: *mut u8, len: usize) -> io::Result<&'static Slot> {
    let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    let registry = registry.get_or_insert_with(|| Registry {
        installed: false,
        free: FIRST.slots.iter().collect(),
        last: &FIRST,
    });
    if !registry.installed {
        install()?;
        registry.installed = true;
    }
    if registry.free.is_empty() {
        let block: &'static SlotBlock = Box::leak(Box::new(SlotBlock::new()));
        registry.last.next.store(ptr::from_ref(block).cast_mut(), SeqCst);
        registry.last = block;
        registry.free.extend(block.slots.iter());
    }
    let slot = registry.free.pop().ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    slot.set(base.addr(), base.addr() + len);
    Ok(slot)
}

/// Ends the guard. The region must not be accessed any more.
pub(crate) fn unregister(slot: &'static Slot) {
    slot.set(0, 0);
    let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(registry) = registry.as_mut() {
        registry.free.push(slot);
    }
}

fn install() -> io::Result<()> {
    // The previous handler must be known before ours can run.
    if PREVIOUS.get().is_none() {
        // SAFETY: sigaction is plain data for which zeros are valid.
        let mut previous: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: no new action is given; `previous` is a valid place for the old one.
        if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut previous) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let _ = PREVIOUS.set(previous);
    }
    // SAFETY: sigaction is plain data for which zeros are valid.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    // The previous handler may be the one that reports stack overflow, which needs the alternate
    // stack.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is complete and its handler only does what a signal handler may do.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a SA_SIGINFO handler.
    let known = unsafe { &*info };
    let code = known.si_code;
    // SAFETY: a SIGBUS raised by an access carries an address; otherwise it is not used.
    let addr = unsafe { known.si_addr() }.addr();
    // A positive code: raised by an access, not sent by a process.
    if code > 0 && replace(addr) {
        return;
    }
    chain(signal, code, info, context);
}

/// Replaces the region around `addr` by zero pages; false if there is none.
fn replace(addr: usize) -> bool {
    let mut block = &FIRST;
    loop {
        for slot in &block.slots {
            let Some((start, end)) = slot.find(addr) else { continue };
            slot.poisoned.store(true, SeqCst);
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
            // SAFETY: errno's address is valid for this thread.
            let errno = unsafe { libc::__errno_location() };
            // SAFETY: as above.
            let saved = unsafe { *errno };
            let base = ptr::without_provenance_mut(start);
            // SAFETY: exactly the range of a registered region, which the accessing thread keeps
            // alive; whoever else reads or writes it now sees zero pages, which is as good as what
            // the client left there.
            let mapped = unsafe { libc::mmap(base, end - start, prot, flags, -1, 0) };
            // SAFETY: errno's address is valid for this thread.
            unsafe { *errno = saved };
            return mapped != libc::MAP_FAILED;
        }
        let next = block.next.load(SeqCst);
        if next.is_null() {
            return false;
        }
        // SAFETY: blocks are leaked, so a pointer once published stays valid.
        block = unsafe { &*next };
    }
}

/// Does what would have happened without us.
fn chain(signal: i32, code: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get();
    let handler = previous.map_or(libc::SIG_DFL, |p| p.sa_sigaction);
    match handler {
        // An ignored SIGBUS that was sent is ignored; one raised by an access kills also when
        // ignored.
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: sigaction is plain data for which zeros (default action) are valid.
            let action: libc::sigaction = unsafe { mem::zeroed() };
            // SAFETY: sets the default action; allowed in a handler.
            unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
            // Delivered when this handler returns; a faulting access repeats by itself as well.
            // SAFETY: raise is allowed in a handler.
            unsafe { libc::raise(signal) };
        }
        handler if previous.is_some_and(|p| p.sa_flags & libc::SA_SIGINFO != 0) => {
            // SAFETY: a handler registered with SA_SIGINFO has this signature.
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: a handler registered without SA_SIGINFO has this signature.
            let handler: extern "C" fn(i32) = unsafe { mem::transmute(handler) };
            handler(signal);
        }
    }
}
