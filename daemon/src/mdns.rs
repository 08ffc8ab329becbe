//! Advertisement of discovery controllers by multicast DNS (NVMe TP8009, RFC 6762 and 6763): hosts
//! that look for `_nvme-disc._tcp` find the target without being told its address.
//!
//! One service per discovery listener, announced only on the interface that has the address, and
//! withdrawn when the [`Advertiser`] is stopped or dropped. What it says is what the discovery log
//! says anyway: address, port, transport and the NQN of the discovery subsystem.

use std::net::SocketAddr;
use std::time::Duration;

use mdns_sd::{IfKind, ServiceDaemon, ServiceInfo, UnregisterStatus};
use nvme::spec::Nqn;

/// The service type of NVMe-oF discovery controllers over TCP (TP8009).
pub const SERVICE_TYPE: &str = "_nvme-disc._tcp.local.";
/// The port of multicast DNS (RFC 6762).
const MDNS_PORT: u16 = 5353;
/// How long the goodbye of a service may take.
const GOODBYE: Duration = Duration::from_millis(500);

/// Why nothing can be advertised.
#[derive(Debug, thiserror::Error)]
pub enum MdnsError {
    /// A listener on every address has no address of its own to advertise.
    #[error(
        "{0} cannot be advertised by multicast DNS: it is no address that hosts can connect to; give \
         the listener one with advertise=ADDR:PORT"
    )]
    Unspecified(SocketAddr),
    /// The responder refused.
    #[error("multicast DNS: {0}")]
    Responder(#[from] mdns_sd::Error),
}

/// Services advertised until it is stopped or dropped.
pub struct Advertiser {
    responder: ServiceDaemon,
    /// Full names of the services.
    services: Vec<String>,
}

impl Advertiser {
    /// Advertises the discovery subsystem `nqn` at `addresses`, which are those that hosts are told.
    ///
    /// # Errors
    /// An address is none that hosts can connect to, or the system gives no multicast socket.
    pub fn start(nqn: &Nqn, addresses: &[SocketAddr]) -> Result<Advertiser, MdnsError> {
        Advertiser::start_on(MDNS_PORT, nqn, addresses)
    }

    /// The same on another port, where nobody else listens: for tests.
    pub(crate) fn start_on(
        port: u16,
        nqn: &Nqn,
        addresses: &[SocketAddr],
    ) -> Result<Advertiser, MdnsError> {
        if let Some(addr) = addresses.iter().find(|addr| addr.ip().is_unspecified()) {
            return Err(MdnsError::Unspecified(*addr));
        }
        let responder = ServiceDaemon::new_with_port(port)?;
        let mut advertiser = Advertiser { responder, services: Vec::new() };
        // The other networks of the machine are not told.
        advertiser.responder.disable_interface(IfKind::All)?;
        for addr in addresses {
            advertiser.responder.enable_interface(IfKind::Addr(addr.ip()))?;
        }
        for addr in addresses {
            let service = service(nqn, *addr)?;
            let name = service.get_fullname().to_owned();
            advertiser.responder.register(service)?;
            advertiser.services.push(name);
        }
        Ok(advertiser)
    }

    /// Tells the networks that the services are gone. Blocks, for half a second per service at the
    /// most.
    pub fn stop(mut self) {
        self.withdraw();
    }

    fn withdraw(&mut self) {
        for name in self.services.drain(..) {
            let gone = self.responder.unregister(&name);
            match gone.map(|answer| answer.recv_timeout(GOODBYE)) {
                Ok(Ok(UnregisterStatus::OK)) => {}
                _ => tracing::debug!(service = name, "no goodbye was sent by multicast DNS"),
            }
        }
        // Its thread ends by itself; an error means that it has.
        let _ = self.responder.shutdown();
    }
}

impl Drop for Advertiser {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// One listener as a service. Instance and host name contain the address, so that several targets
/// on one network, and several listeners of one target, have different ones.
fn service(nqn: &Nqn, addr: SocketAddr) -> Result<ServiceInfo, MdnsError> {
    let label: String = addr
        .ip()
        .to_string()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let instance = format!("penstock-{label}-{}", addr.port());
    let host = format!("penstock-{label}.local.");
    let properties = [("p", "tcp"), ("nqn", nqn.as_str())];
    Ok(ServiceInfo::new(SERVICE_TYPE, &instance, &host, addr.ip(), addr.port(), &properties[..])?)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Instant;

    use mdns_sd::ServiceEvent;

    use super::*;

    fn nqn() -> Nqn {
        "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000001".parse().unwrap()
    }

    #[test]
    fn a_listener_on_every_address_is_not_advertised() {
        let any = "0.0.0.0:8009".parse().unwrap();
        let error = Advertiser::start_on(45353, &nqn(), &[any]).err().expect("refused");
        assert!(error.to_string().contains("advertise="), "{error}");
    }

    #[test]
    fn names_differ_by_address_and_port() {
        let name = |addr: &str| service(&nqn(), addr.parse().unwrap()).unwrap();
        let a = name("192.0.2.7:8009");
        assert_eq!(a.get_fullname(), "penstock-192-0-2-7-8009._nvme-disc._tcp.local.");
        assert_eq!(a.get_property_val_str("nqn"), Some(nqn().as_str()));
        assert_eq!(a.get_property_val_str("p"), Some("tcp"));
        assert_ne!(a.get_fullname(), name("192.0.2.7:8010").get_fullname());
        assert_ne!(a.get_hostname(), name("[fd00::7]:8009").get_hostname());
    }

    /// A port that is free now; nobody else of this machine speaks multicast DNS on it.
    fn free_port() -> u16 {
        UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_browser_finds_the_service_and_sees_it_go() {
        let port = free_port();
        let addr: SocketAddr = "127.0.0.1:18009".parse().unwrap();
        let browser = ServiceDaemon::new_with_port(port).unwrap();
        browser.disable_interface(IfKind::All).unwrap();
        browser.enable_interface(IfKind::Addr(addr.ip())).unwrap();
        let events = browser.browse(SERVICE_TYPE).unwrap();
        let advertiser = Advertiser::start_on(port, &nqn(), &[addr]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let next = |what: &str| {
            let left = deadline.saturating_duration_since(Instant::now());
            events.recv_timeout(left).unwrap_or_else(|_| panic!("{what} in time"))
        };
        let found = loop {
            if let ServiceEvent::ServiceResolved(found) = next("an answer") {
                break found;
            }
        };
        assert_eq!(found.get_fullname(), "penstock-127-0-0-1-18009._nvme-disc._tcp.local.");
        assert_eq!(found.get_port(), 18009);
        assert_eq!(found.get_property_val_str("p"), Some("tcp"));
        assert_eq!(found.get_property_val_str("nqn"), Some(nqn().as_str()));
        assert!(found.get_addresses().iter().any(|ip| ip.to_ip_addr() == addr.ip()));
        advertiser.stop();
        loop {
            if let ServiceEvent::ServiceRemoved(_, name) = next("a goodbye") {
                assert_eq!(name, found.get_fullname());
                break;
            }
        }
        browser.shutdown().unwrap();
    }
}
