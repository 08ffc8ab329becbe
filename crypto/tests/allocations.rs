//! Sealing and opening allocate nothing per record; a handshake holds little while it waits.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use crypto::TlsKey;
use crypto::psk::{Derivation, Identity, IdentityVersion, Psk, RetainedKey, Suite};
use crypto::tls::{
    Client, Established, KeyUpdates, PskLookup, Server, Session, Unknown, candidates,
};

const HOST: &str = "nqn.2014-08.org.example:host";
const SUB: &str = "nqn.2014-08.org.example:sub";

struct Store(TlsKey);

impl PskLookup for Store {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        Ok(candidates([&self.0], identity))
    }
}

fn handshake() -> (Established, Established) {
    let key = TlsKey::generate(Suite::Aes256GcmSha384, &[1; 48]);
    let retained =
        RetainedKey::new(&key, HOST, Derivation::Rfc8446).unwrap_or_else(|e| panic!("{e}"));
    let psk = retained.psk(IdentityVersion::V0, HOST, SUB).unwrap_or_else(|e| panic!("{e}"));
    let mut client = Client::new(&psk).unwrap_or_else(|e| panic!("{e}"));
    let mut server = Server::new(Arc::new(Store(key))).unwrap_or_else(|e| panic!("{e}"));
    server.feed(&client.take()).unwrap_or_else(|e| panic!("{e}"));
    client.feed(&server.take()).unwrap_or_else(|e| panic!("{e}"));
    server.feed(&client.take()).unwrap_or_else(|e| panic!("{e}"));
    (client.finish().expect("done"), server.finish().expect("done"))
}

#[test]
fn records_are_sealed_and_opened_without_allocating() {
    let (client, server) = handshake();
    let mut host = Session::new(&client, KeyUpdates::Auto);
    let mut target = Session::new(&server, KeyUpdates::Auto);
    let data = vec![7; 100_000];
    let mut wire = Vec::with_capacity(3 * Session::sealed_len_max(data.len()));
    let pool = iobuf::Pool::new(1 << 20).unwrap_or_else(|e| panic!("{e}"));
    let mut list = iobuf::SgList::default();
    pool.alloc(data.len(), &mut list).unwrap_or_else(|e| panic!("{e}"));
    let mut round = || {
        wire.clear();
        host.seal_slices(&[&data[..72], &data[72..]], &mut wire).unwrap_or_else(|e| panic!("{e}"));
        let gather = iobuf::Gather::of_list(&list);
        host.seal(&gather, &mut wire).unwrap_or_else(|e| panic!("{e}"));
        let opened = wire.len();
        host.seal(&gather, &mut wire).unwrap_or_else(|e| panic!("{e}"));
        let mut bytes = 0;
        // Cut, so that records are put together too.
        for piece in wire[..opened].chunks_mut(5000) {
            let result = target.open(piece, &mut |plain| bytes += plain.bytes().len());
            result.unwrap_or_else(|e| panic!("{e}"));
        }
        assert_eq!(bytes, 2 * data.len());
        let mut placed = 0;
        for piece in wire[opened..].chunks_mut(20_000) {
            let len = data.len() - placed;
            let (taken, more) =
                target.open_to(piece, &list, placed, len).unwrap_or_else(|e| panic!("{e}"));
            placed += more;
            let result =
                target.open(&mut piece[taken..], &mut |plain| placed += plain.bytes().len());
            result.unwrap_or_else(|e| panic!("{e}"));
        }
        assert_eq!(placed, data.len());
    };
    round();
    let before = COUNT.get();
    for _ in 0..50 {
        round();
    }
    assert_eq!(COUNT.get() - before, 0);
}

/// What a target holds for a host that has said hello and then nothing. (The library's key shares
/// are not in the count, as they come from C's allocator: some 4 KiB with a hybrid group.)
#[test]
fn a_half_open_handshake_holds_little() {
    let key = TlsKey::generate(Suite::Aes256GcmSha384, &[1; 48]);
    let retained =
        RetainedKey::new(&key, HOST, Derivation::Rfc8446).unwrap_or_else(|e| panic!("{e}"));
    let psk = retained.psk(IdentityVersion::V0, HOST, SUB).unwrap_or_else(|e| panic!("{e}"));
    let hello = Client::new(&psk).unwrap_or_else(|e| panic!("{e}")).take();
    let store = Arc::new(Store(key));
    let open = || {
        let mut server = Server::new(store.clone()).unwrap_or_else(|e| panic!("{e}"));
        server.feed(&hello).unwrap_or_else(|e| panic!("{e}"));
        drop(server.take());
        server
    };
    drop(open());
    let before = BYTES.get();
    let servers: Vec<Server> = (0..100).map(|_| open()).collect();
    let each = (BYTES.get() - before) / 100;
    println!("a half-open handshake holds {each} bytes");
    assert!(each < 64 << 10, "{each} bytes");
    drop(servers);
    let left = BYTES.get() - before;
    assert!(left.abs() < 4096, "{left} bytes were not given back");
}

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// UNSAFETY: counting allocations takes an allocator, whose trait is unsafe.
#[expect(unsafe_code)]
// SAFETY: everything is the system allocator's; the counter changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        BYTES.set(BYTES.get() + layout.size() as i64);
        // SAFETY: passed on as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get() - layout.size() as i64);
        // SAFETY: passed on as it came.
        unsafe { System.dealloc(ptr, layout) }
    }
}
