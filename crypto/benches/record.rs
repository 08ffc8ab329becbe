//! What a record costs: `cargo bench -p crypto --bench record`.
//!
//! Per size and suite: sealing into the send buffer, opening in place, opening to where the bytes
//! belong, and opening in place with a copy to there. The median of several rounds; the last column is
//! what a core carries.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crypto::TlsKey;
use crypto::psk::{Derivation, Identity, IdentityVersion, Psk, RetainedKey, Suite};
use crypto::tls::{
    Client, Established, KeyUpdates, Plain, PskLookup, RECORD_PLAIN_MAX, Server, Session, Unknown,
    candidates,
};
use iobuf::{Pool, SgList};

const HOST: &str = "nqn.2014-08.org.example:host";
const SUB: &str = "nqn.2014-08.org.example:sub";
const ROUNDS: usize = 31;

struct Store(TlsKey);

impl PskLookup for Store {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        Ok(candidates([&self.0], identity))
    }
}

fn psk(key: &TlsKey) -> Psk {
    let retained = RetainedKey::new(key, HOST, Derivation::Rfc8446).expect("a name");
    retained.psk(IdentityVersion::V0, HOST, SUB).expect("names")
}

fn handshake(suite: Suite) -> (Established, Established) {
    let key = TlsKey::generate(suite, &[1; 48]);
    let mut client = Client::new(&psk(&key)).expect("a key");
    let mut server = Server::new(Arc::new(Store(key))).expect("settings");
    server.feed(&client.take()).expect("a good hello");
    client.feed(&server.take()).expect("a good answer");
    server.feed(&client.take()).expect("a good end");
    (client.finish().expect("done"), server.finish().expect("done"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn line(name: &str, size: usize, ns: f64) {
    let gb = size as f64 / ns;
    println!("{name:<34} {size:>6} B  {ns:>9.1} ns  {gb:>6.2} GB/s");
}

fn main() {
    for suite in [Suite::Aes128GcmSha256, Suite::Aes256GcmSha384] {
        println!("{suite}");
        let (client, server) = handshake(suite);
        for size in [72, 4096, RECORD_PLAIN_MAX, 128 << 10] {
            let count = ((4 << 20) / (size + 256)).clamp(1, 4096);
            let data = vec![0x5A; size];
            let mut wire = Vec::with_capacity(Session::sealed_len_max(size) * count);
            // Where bytes belong: 1 MiB in turn, as a pool gives it out.
            let pool = Pool::new(1 << 20).expect("memory");
            let mut places = SgList::default();
            pool.alloc(1 << 20, &mut places).expect("a new pool");
            let place = |n: usize| n * size.next_multiple_of(4096) % places.len();
            let (mut seals, mut opens, mut direct, mut copies) = (vec![], vec![], vec![], vec![]);
            let mut host = Session::new(&client, KeyUpdates::Auto);
            let mut target = Session::new(&server, KeyUpdates::Auto);
            let per = |time: Duration| time.as_nanos() as f64 / count as f64;
            for _ in 0..ROUNDS {
                let mut seal = |wire: &mut Vec<u8>| {
                    wire.clear();
                    let start = Instant::now();
                    for _ in 0..count {
                        host.seal_slices(&[black_box(&data)], wire).expect("a good key");
                    }
                    per(start.elapsed())
                };
                seals.push(seal(&mut wire));
                let start = Instant::now();
                let mut bytes = 0;
                target.open(&mut wire, &mut |plain| bytes += plain.bytes().len()).expect("good");
                opens.push(per(start.elapsed()));
                assert_eq!(bytes, size * count);

                seal(&mut wire);
                let start = Instant::now();
                let mut taken = 0;
                for n in 0..count {
                    let opened = target.open_to(&wire[taken..], &places, place(n), size);
                    taken += opened.expect("good").0;
                }
                direct.push(per(start.elapsed()));
                assert_eq!(taken, wire.len());

                seal(&mut wire);
                let start = Instant::now();
                let mut bytes = 0;
                let mut copy = |plain: Plain<'_>| {
                    let (n, at) = (bytes / size, bytes % size);
                    places.copy_from_slice(place(n) + at, plain.bytes()).expect("inside");
                    bytes += plain.bytes().len();
                };
                target.open(&mut wire, &mut copy).expect("good");
                copies.push(per(start.elapsed()));
            }
            line("  seal", size, median(seals));
            line("  open in place", size, median(opens));
            line("  open into place", size, median(direct));
            line("  open in place, and copy", size, median(copies));
        }
        let times = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                black_box(handshake(suite));
                start.elapsed().as_nanos() as f64 / 1000.0
            })
            .collect();
        println!("  both ends of a handshake: {:.0} us", median(times));
    }
}
