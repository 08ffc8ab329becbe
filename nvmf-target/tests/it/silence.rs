//! What is logged says nothing of keys.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crypto::TlsKey;
use nvmf_target::Tls;
use tracing_subscriber::fmt::MakeWriter;

use crate::rig::{BLOCK, hostnqn};
use crate::{auth, tls};

/// Everything that was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

/// The ways in which a key may get into a text: hexadecimal, a list of bytes, Base64 as in its
/// interchange format. A part is too much already.
fn shapes(bytes: &[u8], text: &str) -> Vec<String> {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let list = format!("{bytes:?}");
    let base64 = text.split(':').nth(2).expect("an interchange format");
    vec![
        hex[..16].to_owned(),
        hex[..16].to_uppercase(),
        list[1..25].to_owned(),
        base64[..12].to_owned(),
    ]
}

#[test]
fn no_log_line_has_anything_of_a_key() {
    // Neither of them is what a counter or an address looks like.
    let ours = TlsKey::new(crypto::KeyHash::Sha256, &[0xb7; 32]).expect("a key");
    let other = tls::key(0xc9, 32);
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    let said = tracing::subscriber::with_default(subscriber, || {
        let (mut rig, keys) = tls::rig(Tls::Required);
        keys.set(&hostnqn(1), tls::tls_keys(vec![tls::entry(ours.clone())]));
        rig.psk = Some(tls::usual(&ours, 1));
        let host = rig.host(1, 1);
        rig.write(&host.io[0], 1, &[1; BLOCK]);
        rig.psk = Some(tls::usual(&other, 1));
        let queue = rig.connection();
        rig.until("the end of the connection", || queue.is_over());
        auth::talk(0xd1, 0xd2, 0xd3);
        // What an operator sees of it.
        format!("{:?} {:?} {:?}", rig.target.status(), keys, queue.refused())
    });
    let log = log.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let log = String::from_utf8(log).expect("text") + &said;
    assert!(log.contains("TLS established") && log.contains("host authenticated"), "{log}");
    assert!(log.contains("expected `NVMe1R01") && log.contains("another secret"), "{log}");
    let mut forbidden = Vec::new();
    for key in [&ours, &other] {
        forbidden.extend(shapes(key.secret().expose(), key.to_text().expose()));
    }
    for key in [0xd1, 0xd2, 0xd3].map(auth::secret) {
        forbidden.extend(shapes(key.secret().expose(), key.to_text().expose()));
    }
    for shape in &forbidden {
        assert!(!log.contains(shape), "{shape} in\n{log}");
    }
    // What would be said would be found.
    let leak = format!("{:?} {}", ours.secret().expose(), ours.to_text().expose());
    assert_eq!(forbidden.iter().filter(|shape| leak.contains(*shape)).count(), 2);
}
