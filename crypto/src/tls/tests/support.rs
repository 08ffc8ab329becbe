use std::collections::HashMap;
use std::sync::Arc;

use crate::key::{KeyHash, TlsKey};
use crate::psk::{Derivation, Identity, IdentityVersion, Psk, RetainedKey};
use crate::tls::{
    Client, Established, Failure, KeyUpdates, Progress, PskLookup, Server, Session, Unknown,
    candidates,
};

pub(super) const HOST: &str =
    "nqn.2014-08.org.nvmexpress:uuid:f8131bac-cdef-4165-866b-5998c1e67890";
pub(super) const SUB: &str = "nqn.2024-05.io.example:subsys1";

pub(super) fn key(len: u8, fill: u8) -> TlsKey {
    let bytes: Vec<u8> = (0..len).map(|n| n ^ fill).collect();
    TlsKey::new(KeyHash::Sha256, &bytes).unwrap_or_else(|e| panic!("{e}"))
}

pub(super) fn psk(key: &TlsKey, version: IdentityVersion, way: Derivation) -> Psk {
    let retained = RetainedKey::new(key, HOST, way).unwrap_or_else(|e| panic!("{e}"));
    retained.psk(version, HOST, SUB).unwrap_or_else(|e| panic!("{e}"))
}

/// Hosts and their keys.
pub(super) struct Store(pub(super) HashMap<String, Vec<TlsKey>>);

impl PskLookup for Store {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        let keys = self.0.get(identity.hostnqn).ok_or(Unknown::Host)?;
        if keys.is_empty() {
            return Err(Unknown::Expired);
        }
        Ok(candidates(keys, identity))
    }
}

pub(super) fn store(keys: &[TlsKey]) -> Arc<Store> {
    Arc::new(Store(HashMap::from([(HOST.to_owned(), keys.to_vec())])))
}

pub(super) fn server(keys: &[TlsKey]) -> Server {
    Server::new(store(keys)).unwrap_or_else(|e| panic!("{e}"))
}

pub(super) fn client(psk: &Psk) -> Client {
    Client::new(psk).unwrap_or_else(|e| panic!("{e}"))
}

/// How two ends that were let to talk ended.
pub(super) struct Ends {
    pub(super) client: Result<Established, Failure>,
    pub(super) server: Result<Established, Failure>,
}

/// Lets them talk in pieces of `piece` bytes, until both are done or one has failed.
pub(super) fn talk(mut client: Client, mut server: Server, piece: usize) -> Ends {
    let (mut client_error, mut server_error) = (None, None);
    let mut client_done = false;
    let mut server_done = false;
    loop {
        let (up, mut is_idle) = (client.take(), true);
        for bytes in up.chunks(piece) {
            is_idle = false;
            match server.feed(bytes) {
                Ok(progress) => server_done |= progress == Progress::Done,
                Err(error) => server_error = Some(error),
            }
        }
        let down = server.take();
        for bytes in down.chunks(piece) {
            is_idle = false;
            match client.feed(bytes) {
                Ok(progress) => client_done |= progress == Progress::Done,
                Err(error) => client_error = Some(error),
            }
        }
        if is_idle {
            break;
        }
    }
    assert_eq!(client_done && server_done, client_error.is_none() && server_error.is_none());
    Ends {
        client: client_error.map_or_else(|| Ok(client.finish().unwrap()), Err),
        server: server_error.map_or_else(|| server.finish().ok_or_else(unfinished), Err),
    }
}

fn unfinished() -> Failure {
    panic!("the server has neither failed nor ended")
}

/// The sessions of client and server behind a good handshake.
pub(super) fn sessions(len: u8) -> (Session, Session) {
    let key = key(len, 0);
    let psk = psk(&key, IdentityVersion::V1, Derivation::Rfc8446);
    let ends = talk(client(&psk), server(&[key]), usize::MAX);
    let (client, server) = (ends.client.ok().unwrap(), ends.server.ok().unwrap());
    assert!(client.leftover.is_empty() && server.leftover.is_empty());
    (Session::new(&client, KeyUpdates::Auto), Session::new(&server, KeyUpdates::Auto))
}

pub(super) fn seal(session: &mut Session, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    session.seal_slices(&[bytes], &mut out).unwrap();
    out
}

pub(super) fn open(
    session: &mut Session,
    wire: &[u8],
) -> (Vec<u8>, Result<(), crate::tls::RecordError>) {
    let mut plain = Vec::new();
    let mut wire = wire.to_vec();
    let result = session.open(&mut wire, &mut |p| plain.extend_from_slice(p.bytes()));
    (plain, result)
}
