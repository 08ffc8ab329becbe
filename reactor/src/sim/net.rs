//! The simulated network: byte streams with delays, splits and cuts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use crate::sim::NetFaults;
use crate::sim::rng::Rng;

/// Bytes that one direction holds before its sender must wait.
const WINDOW_BYTES: usize = 256 << 10;
/// Time a byte or a handshake takes when no delay is asked for.
const DELAY_MIN: Duration = Duration::from_micros(5);

/// How a direction ends, as its receiver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Fin,
    Reset,
}

struct Piece {
    arrives: Duration,
    bytes: VecDeque<u8>,
}

/// One direction of a connection.
#[derive(Default)]
struct Direction {
    pieces: VecDeque<Piece>,
    queued_bytes: usize,
    /// Pieces stay in order.
    last_arrival: Duration,
    end: Option<(Duration, End)>,
}

struct Connection {
    names: [String; 2],
    /// `to[side]` carries what arrives at that side.
    to: [Direction; 2],
    open: [bool; 2],
    /// Closing discards what is not sent.
    resets: [bool; 2],
    /// Cut: until when each side may still believe in the connection.
    cut: Option<[Duration; 2]>,
}

/// One side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EndId {
    pub(crate) connection: u64,
    pub(crate) side: usize,
}

/// What became of a send.
pub(crate) enum Accepted {
    /// So many bytes were taken; zero: the window is full.
    Bytes(usize),
    /// The connection is broken.
    Broken(i32),
}

#[derive(Default)]
pub(crate) struct Net {
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    pub(crate) listening: BTreeSet<SocketAddr>,
    pub(crate) faults: NetFaults,
}

impl Net {
    pub(crate) fn delay(&self, rng: &mut Rng) -> Duration {
        let spread = self.faults.delay_max.saturating_sub(DELAY_MIN).as_nanos() as u64;
        DELAY_MIN + Duration::from_nanos(rng.below(spread + 1))
    }

    /// A new connection; names are what each side calls its peer.
    pub(crate) fn connect(&mut self, names: [String; 2]) -> [EndId; 2] {
        let connection = self.next_connection;
        self.next_connection += 1;
        self.connections.insert(
            connection,
            Connection {
                names,
                to: Default::default(),
                open: [true; 2],
                resets: [false; 2],
                cut: None,
            },
        );
        [EndId { connection, side: 0 }, EndId { connection, side: 1 }]
    }

    pub(crate) fn set_reset_on_close(&mut self, end: EndId, resets: bool) {
        if let Some(connection) = self.connections.get_mut(&end.connection) {
            connection.resets[end.side] = resets;
        }
    }

    pub(crate) fn peer(&self, end: EndId) -> String {
        self.connections
            .get(&end.connection)
            .map_or_else(String::new, |connection| connection.names[end.side].clone())
    }

    /// Takes the front of `bytes` for the peer of `end`.
    pub(crate) fn send(
        &mut self,
        end: EndId,
        bytes: &[u8],
        now: Duration,
        rng: &mut Rng,
    ) -> Accepted {
        let delay = self.delay(rng);
        let faults = self.faults;
        let Some(connection) = self.connections.get_mut(&end.connection) else {
            return Accepted::Broken(libc::EPIPE);
        };
        if let Some(known) = connection.cut {
            // Until the news arrives, bytes are taken and go nowhere.
            let is_known = now >= known[end.side];
            return if is_known {
                Accepted::Broken(libc::ECONNRESET)
            } else {
                Accepted::Bytes(bytes.len())
            };
        }
        let peer = 1 - end.side;
        if !connection.open[peer] {
            return Accepted::Broken(libc::EPIPE);
        }
        let direction = &mut connection.to[peer];
        let mut len = bytes.len().min(WINDOW_BYTES - direction.queued_bytes.min(WINDOW_BYTES));
        if faults.split {
            len = rng.skewed(len);
        }
        if len == 0 {
            return Accepted::Bytes(0);
        }
        let is_cut = rng.chance(faults.cut_per_million);
        if is_cut {
            len = rng.below(len as u64 + 1) as usize;
        }
        let arrives = direction.last_arrival.max(now + delay);
        direction.last_arrival = arrives;
        direction.queued_bytes += len;
        direction
            .pieces
            .push_back(Piece { arrives, bytes: bytes[..len].iter().copied().collect() });
        if is_cut {
            self.cut(end.connection, now, rng);
        }
        Accepted::Bytes(len)
    }

    /// Bytes that may be received at `end` now, at most `max`.
    pub(crate) fn receive(
        &mut self,
        end: EndId,
        max: usize,
        now: Duration,
        rng: &mut Rng,
        out: &mut Vec<u8>,
    ) {
        out.clear();
        let split = self.faults.split;
        let Some(connection) = self.connections.get_mut(&end.connection) else { return };
        let direction = &mut connection.to[end.side];
        let arrived = direction.arrived_bytes(now).min(max);
        let want = if split { rng.skewed(arrived) } else { arrived };
        while out.len() < want
            && let Some(piece) = direction.pieces.front_mut()
        {
            let count = piece.bytes.len().min(want - out.len());
            out.extend(piece.bytes.drain(..count));
            if piece.bytes.is_empty() {
                direction.pieces.pop_front();
            }
        }
        direction.queued_bytes -= out.len();
    }

    /// Whether bytes can be received at `end` now.
    pub(crate) fn is_readable(&self, end: EndId, now: Duration) -> bool {
        let connection = self.connections.get(&end.connection);
        connection.is_some_and(|connection| connection.to[end.side].arrived_bytes(now) > 0)
    }

    /// How the stream to `end` ended, when all bytes before that were received.
    pub(crate) fn end(&self, end: EndId, now: Duration) -> Option<End> {
        let direction = &self.connections.get(&end.connection)?.to[end.side];
        let (at, how) = direction.end?;
        (at <= now && direction.pieces.is_empty()).then_some(how)
    }

    /// When something new can be received at `end`.
    pub(crate) fn next_arrival(&self, end: EndId) -> Option<Duration> {
        let direction = &self.connections.get(&end.connection)?.to[end.side];
        let piece = direction.pieces.front().map(|piece| piece.arrives);
        piece.or(direction.end.map(|(at, _)| at))
    }

    /// When a sender at `end` learns that the connection was cut.
    pub(crate) fn break_time(&self, end: EndId) -> Option<Duration> {
        Some(self.connections.get(&end.connection)?.cut?[end.side])
    }

    /// One side is closed.
    pub(crate) fn close(&mut self, end: EndId, now: Duration, rng: &mut Rng) {
        let delay = self.delay(rng);
        let Some(connection) = self.connections.get_mut(&end.connection) else { return };
        connection.open[end.side] = false;
        let peer = 1 - end.side;
        // TCP answers data that nobody took with a reset.
        let unread = !connection.to[end.side].pieces.is_empty();
        let resets = connection.resets[end.side];
        let direction = &mut connection.to[peer];
        if resets {
            // What is on the wire already still arrives.
            direction.truncate(rng, now);
        }
        let at = direction.last_arrival.max(now + delay);
        let how = if unread || resets { End::Reset } else { End::Fin };
        direction.end.get_or_insert((at, how));
        if connection.open == [false; 2] {
            self.connections.remove(&end.connection);
        }
    }

    /// Cuts one connection: of what is under way, some front part still arrives.
    fn cut(&mut self, id: u64, now: Duration, rng: &mut Rng) {
        let delays = [self.delay(rng), self.delay(rng)];
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.cut.is_some() {
            return;
        }
        connection.cut = Some([now + delays[0], now + delays[1]]);
        for (side, direction) in connection.to.iter_mut().enumerate() {
            direction.truncate(rng, now);
            let at = direction.last_arrival.max(now + delays[side]);
            let how = if rng.one_in(4) { End::Fin } else { End::Reset };
            direction.end.get_or_insert((at, how));
        }
    }

    pub(crate) fn cut_all(&mut self, now: Duration, rng: &mut Rng) {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            self.cut(id, now, rng);
        }
    }
}

impl Direction {
    fn arrived_bytes(&self, now: Duration) -> usize {
        let arrived = self.pieces.iter().take_while(|piece| piece.arrives <= now);
        arrived.map(|piece| piece.bytes.len()).sum()
    }

    /// Loses a random rear part of what has not arrived.
    fn truncate(&mut self, rng: &mut Rng, now: Duration) {
        let arrived = self.arrived_bytes(now);
        let under_way = self.queued_bytes - arrived;
        let mut keep = arrived + rng.below(under_way as u64 + 1) as usize;
        self.queued_bytes = keep;
        for piece in &mut self.pieces {
            piece.bytes.truncate(keep);
            keep -= piece.bytes.len();
        }
        self.pieces.retain(|piece| !piece.bytes.is_empty());
    }
}
