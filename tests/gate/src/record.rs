//! Records of TLS: sealing from where the bytes are, as a target does, and opening in place.

use std::sync::Arc;

use crypto::TlsKey;
use crypto::psk::{Derivation, Identity, IdentityVersion, Psk, RetainedKey, Suite};
use crypto::tls::{
    Client, Established, KeyUpdates, PskLookup, Server, Session, Unknown, candidates,
};

const HOST: &str = "nqn.2014-08.org.example:host";
const SUBSYSTEM: &str = "nqn.2014-08.org.example:sub";

struct Store(TlsKey);

impl PskLookup for Store {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        Ok(candidates([&self.0], identity))
    }
}

fn handshake() -> (Established, Established) {
    let key = TlsKey::generate(Suite::Aes128GcmSha256, &[1; 48]);
    let retained = RetainedKey::new(&key, HOST, Derivation::Rfc8446).expect("a name");
    let psk = retained.psk(IdentityVersion::V0, HOST, SUBSYSTEM).expect("names");
    let mut client = Client::new(&psk).expect("a key");
    let mut server = Server::new(Arc::new(Store(key))).expect("settings");
    server.feed(&client.take()).expect("a good hello");
    client.feed(&server.take()).expect("a good answer");
    server.feed(&client.take()).expect("a good end");
    (client.finish().expect("done"), server.finish().expect("done"))
}

/// So many records of `size` bytes.
pub(crate) fn seal_and_open(count: u64, size: usize) {
    let (client, server) = handshake();
    let mut host = Session::new(&client, KeyUpdates::Auto);
    let mut target = Session::new(&server, KeyUpdates::Auto);
    let data = vec![0x5a; size];
    let mut wire = Vec::with_capacity(Session::sealed_len_max(size));
    crate::counted(|| {
        (0..count).for_each(|_| {
            wire.clear();
            target.seal_slices(&[&data], &mut wire).expect("a good key");
            let mut opened = 0;
            host.open(&mut wire, &mut |plain| opened += plain.bytes().len())
                .expect("a good record");
            assert_eq!(opened, size);
        })
    });
}
