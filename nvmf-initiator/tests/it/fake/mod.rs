//! A target for tests: `nvme::tcp::Target` and `nvme::ctrl::Controller` over a simulated network,
//! with a disk in memory and a script that says where it is to misbehave.
//!
//! It behaves as a good target must towards a host that comes back: a new association of the host
//! ends the old one at once, so nothing of the old one is executed after that.

mod tls;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crypto::dhchap::{self, Concatenation, DhGroup, ENTROPY_LEN};
use crypto::{DhchapKey, Hash};
use iobuf::SgList;
use nvme::ctrl::io::{
    COPY_RANGE_LEN, DSM_RANGE_LEN, Fuse, IoCommand, copy_range, decode, dsm_range,
};
use nvme::ctrl::{
    AdminOutcome, Controller, ControllerConfig, ControllerKind, HealthCounters, Instance,
    admit_admin,
};
use nvme::fabrics::{ConnectReject, ConnectRequest};
use nvme::spec::{AsciiField, Cqe, Direction, FabricsType, Nqn, NvmOpcode, Sqe, Status};
use nvme::subsys::discovery::{DiscoveryEntry, DiscoveryLog};
use nvme::subsys::{Limits, NamespaceInfo, SubsystemInfo};
use nvme::tcp::{Crc32c, Target, TargetConfig, TargetEvent};
use reactor::net::{HEAD_BYTES_MAX, Rx, Stream, StreamConfig};
use reactor::sim::World;
use reactor::{Core, Local, Progress, Socket, Task};

pub use tls::{Sealed, Tls};

pub const SUBNQN: &str = "nqn.2025-01.io.example:fake";
pub const HOSTNQN: &str = "nqn.2025-01.io.example:host";
pub const UUID: [u8; 16] = *b"\x01\x02\x03\x04\x05\x06\x47\x08\x89\x0a\x0b\x0c\x0d\x0e\x0f\x10";

/// What becomes of one I/O command.
pub enum Answer {
    /// What a good target does.
    Good,
    /// It is not executed, and completes with this.
    Status(Status),
    /// It is never answered.
    Silence,
    /// It is not executed; these bytes are sent, made for this cid.
    Bytes(Vec<u8>),
    /// The connection is closed.
    Close,
}

type OnIo = Box<dyn FnMut(&Sqe) -> Answer>;
/// Called with the queue's identifier.
type OnAuth = Box<dyn FnMut(u16)>;

/// What the target does differently from a good one, and its sizes.
pub struct Script {
    pub on_io: OnIo,
    /// Answers an admin Connect with this.
    pub refuse: Option<ConnectReject>,
    /// Answers an I/O queue's Connect with this.
    pub refuse_io: Option<ConnectReject>,
    /// Sent on a new connection instead of ICResp.
    pub greeting: Option<Vec<u8>>,
    /// Admin commands after bring-up are not answered.
    pub is_admin_mute: bool,
    /// Longest delay of an I/O command; commands overtake each other.
    pub delay_max: Duration,
    /// How many of a hundred I/O commands are delayed; the others are done at once.
    pub delay_percent: u64,
    /// Bytes asked for by one R2T.
    pub r2t_bytes: u32,
    /// Bytes of one C2HData PDU.
    pub c2h_bytes: u32,
    /// The last C2HData PDU carries SUCCESS; else a response capsule follows.
    pub uses_success: bool,
    pub max_h2c_data: u32,
    pub allows_digests: bool,
    /// A new association of the host ends the old one, and Cross-Controller Reset says so. Without
    /// that, the old one goes on until its keep alive expires.
    pub fences: bool,
    /// A change that is under way when its connection ends is done all the same, when its delay is
    /// over, as a target does that has handed it to a disk.
    pub lands_late: bool,
    /// A write that data was asked for is answered with this at once, and nothing more is read
    /// until [`Fake::read_on`].
    pub early: Option<Status>,
    /// Hosts have to authenticate with this secret, without a group.
    pub secret: Option<DhchapKey>,
    /// Called when a command of an authentication has come and is not answered yet.
    pub on_auth: OnAuth,
}

impl Default for Script {
    fn default() -> Script {
        Script {
            on_io: Box::new(|_| Answer::Good),
            refuse: None,
            refuse_io: None,
            greeting: None,
            is_admin_mute: false,
            delay_max: Duration::ZERO,
            delay_percent: 100,
            r2t_bytes: 1 << 20,
            c2h_bytes: 1 << 20,
            uses_success: true,
            max_h2c_data: 128 << 10,
            allows_digests: true,
            fences: true,
            lands_late: false,
            early: None,
            secret: None,
            on_auth: Box::new(|_| {}),
        }
    }
}

/// What was seen of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub associations: u64,
    pub io_connects: u64,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub write_zeroes: u64,
    pub deallocates: u64,
    /// Fused pairs that came, done or not.
    pub pairs: u64,
    pub r2ts: u64,
    pub in_capsule: u64,
    pub keep_alives: u64,
    pub term_reqs: u64,
    pub shutdowns: u64,
    pub faults: u64,
    pub fua: u64,
    pub longest_bytes: u64,
    /// Most I/O commands that one queue had out at a time.
    pub deepest: u64,
    /// Connections of I/O queues that the host reset, and that it closed in order.
    pub io_resets: u64,
    pub io_ends: u64,
    /// Changes done after their connection had ended.
    pub late: u64,
    /// Connections of hosts that said in TLS that nothing follows, and that did not.
    pub tls_ends: u64,
    pub tls_cuts: u64,
}

pub struct Fake {
    pub addr: SocketAddr,
    world: World,
    pub disk: RefCell<Vec<u8>>,
    pub script: RefCell<Script>,
    pub seen: Cell<Seen>,
    pub subsys: RefCell<Arc<SubsystemInfo>>,
    /// What controllers say of their health.
    pub health: Cell<HealthCounters>,
    /// What it tells as a discovery controller; `None`: it is none.
    log: RefCell<Option<Arc<DiscoveryLog>>>,
    arrivals: RefCell<Vec<Socket>>,
    /// Ends all connections at the next poll, without a word.
    kill: Cell<bool>,
    /// The same in order.
    part: Cell<bool>,
    read_on: Cell<bool>,
    /// What new connections have of TLS; `None`: they are in plaintext.
    pub tls: RefCell<Option<Rc<Tls>>>,
    /// Authentications begun, by queue.
    pub authentications: RefCell<BTreeMap<u16, u64>>,
}

pub fn namespace(blocks: u64) -> NamespaceInfo {
    NamespaceInfo {
        uuid: UUID,
        nguid: UUID,
        write_cache: true,
        deallocate: true,
        write_zeroes: true,
        deallocated_reads_zero: true,
        ..NamespaceInfo::new(1, 512, blocks)
    }
}

pub fn subsystem(namespace: NamespaceInfo, limits: Limits) -> Arc<SubsystemInfo> {
    let nqn = Nqn::new(SUBNQN).unwrap();
    let info = SubsystemInfo::new(
        nqn,
        AsciiField::new("0001").unwrap(),
        AsciiField::new("fake").unwrap(),
        AsciiField::new("1").unwrap(),
        vec![namespace],
        limits,
    );
    Arc::new(info.unwrap())
}

impl Fake {
    /// A target on a core of its own, which it returns.
    pub fn start(world: &World, subsys: Arc<SubsystemInfo>, script: Script) -> (Rc<Fake>, Core) {
        Fake::start_at(world, ([10, 0, 0, 1], 4420).into(), subsys, script, None)
    }

    /// A discovery controller with this log, on a core of its own, which it returns.
    pub fn discovery(
        world: &World,
        addr: SocketAddr,
        entries: &[DiscoveryEntry],
    ) -> (Rc<Fake>, Core) {
        let field = AsciiField::new("1").unwrap();
        let subsys = SubsystemInfo::discovery(
            field,
            AsciiField::new("fake").unwrap(),
            AsciiField::new("1").unwrap(),
            Limits::default(),
        );
        let log = Arc::new(DiscoveryLog::new(1, entries));
        Fake::start_at(world, addr, Arc::new(subsys.unwrap()), Script::default(), Some(log))
    }

    /// Another log from now on. It tells its hosts.
    pub fn tell(&self, entries: &[DiscoveryEntry], core: &Core) {
        let generation = self.log.borrow().as_ref().map_or(0, |log| log.genctr());
        *self.log.borrow_mut() = Some(Arc::new(DiscoveryLog::new(generation + 1, entries)));
        core.handle().wake();
    }

    fn start_at(
        world: &World,
        addr: SocketAddr,
        subsys: Arc<SubsystemInfo>,
        script: Script,
        log: Option<Arc<DiscoveryLog>>,
    ) -> (Rc<Fake>, Core) {
        let bytes = subsys.namespaces().first().map_or(0, NamespaceInfo::size_bytes) as usize;
        let fake = Rc::new(Fake {
            addr,
            world: world.clone(),
            log: RefCell::new(log),
            disk: RefCell::new(vec![0; bytes]),
            script: RefCell::new(script),
            seen: Cell::default(),
            subsys: RefCell::new(subsys),
            health: Cell::default(),
            arrivals: RefCell::default(),
            kill: Cell::new(false),
            part: Cell::new(false),
            read_on: Cell::new(false),
            tls: RefCell::default(),
            authentications: RefCell::default(),
        });
        let mut core = world.core();
        core.spawn(Box::new(FakeTask {
            fake: Rc::clone(&fake),
            local: core.local(),
            connections: Vec::new(),
            parting: Vec::new(),
            controllers: BTreeMap::new(),
            late: Vec::new(),
            next_cntlid: 1,
            next_connection: 0,
        }));
        fake.listen(&core);
        (fake, core)
    }

    fn listen(self: &Rc<Fake>, core: &Core) {
        self.listen_at(self.addr, core);
    }

    /// Another way to the same subsystem.
    pub fn listen_at(self: &Rc<Fake>, addr: SocketAddr, core: &Core) {
        let (fake, handle) = (Rc::clone(self), core.handle());
        let accept = move |socket| {
            fake.arrivals.borrow_mut().push(socket);
            handle.wake();
        };
        self.world.listen(addr, Box::new(accept));
    }

    /// The target is gone: connections end, new ones are refused.
    pub fn stop(self: &Rc<Fake>, core: &Core) {
        self.world.unlisten(self.addr);
        self.kill.set(true);
        core.handle().wake();
    }

    /// All connections end, in the way that a target does that ends by itself.
    pub fn part(&self, core: &Core) {
        self.part.set(true);
        core.handle().wake();
    }

    /// The target is back, with its disk as it was.
    pub fn restart(self: &Rc<Fake>, core: &Core) {
        self.listen(core);
    }

    /// Connections that `early` stopped are read again.
    pub fn read_on(&self, core: &Core) {
        self.read_on.set(true);
        core.handle().wake();
    }

    /// What a Compare finds.
    fn is_equal(&self, compare: &Slot) -> bool {
        match decode(&compare.sqe, &self.subsys.borrow()) {
            Ok(IoCommand::Compare { offset, len, .. }) => {
                self.disk.borrow()[offset as usize..][..len as usize] == compare.data[..]
            }
            other => panic!("the first of a pair is {other:?}"),
        }
    }

    fn count(&self, change: impl FnOnce(&mut Seen)) {
        let mut seen = self.seen.get();
        change(&mut seen);
        self.seen.set(seen);
    }
}

/// What a connection is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Nothing but ICReq so far.
    New,
    Admin {
        cntlid: u16,
    },
    Io {
        cntlid: u16,
        qid: u16,
    },
}

/// A command of the host.
struct Slot {
    sqe: Sqe,
    data: Vec<u8>,
    /// Host-to-controller bytes in all, and how many were asked for or came with the capsule.
    want: u32,
    asked: u32,
    /// When it is executed, once its data is there.
    due: Option<Duration>,
    /// The other of its fused pair.
    other: Option<u16>,
    /// Its data is there, and it waits for the other's.
    is_held: bool,
    /// Of the second of a pair that is due: the first, and its slot.
    first: Option<(u16, Box<Slot>)>,
}

struct Connection {
    id: u64,
    role: Role,
    stream: Stream,
    qpair: Target,
    slots: BTreeMap<u16, Slot>,
    /// Payloads on their way, by token.
    payloads: BTreeMap<u32, SgList>,
    next_token: u32,
    /// The first of a fused pair, which has to be followed by its second.
    first: Option<u16>,
    is_paused: bool,
    early: Option<(Duration, u16, Status)>,
    is_over: bool,
    /// Before the first PDU.
    shaking: Option<tls::Shaking>,
    is_tls: bool,
    /// The layer's word for `role`.
    is_io: Rc<Cell<bool>>,
    auth: Option<dhchap::Controller>,
}

impl Connection {
    /// Goes on with TLS; `true` when that is over.
    fn shake(&mut self) -> bool {
        let Some(shaking) = &mut self.shaking else { return true };
        match shaking.step(&mut self.stream) {
            tls::Step::Waits => false,
            tls::Step::Done => {
                self.shaking = None;
                true
            }
            tls::Step::Failed => {
                self.is_over = true;
                false
            }
        }
    }

    /// The connection may have failed since it was last looked at.
    fn push(&mut self, pdu: &[u8]) {
        self.is_over |= self.stream.push(pdu, None, None, None).is_err();
    }
}

struct FakeTask {
    fake: Rc<Fake>,
    local: Local,
    connections: Vec<Connection>,
    /// What is left of those that end in order.
    parting: Vec<Stream>,
    controllers: BTreeMap<u16, Controller>,
    /// Changes whose connection has ended.
    late: Vec<Slot>,
    next_cntlid: u16,
    next_connection: u64,
}

impl Task for FakeTask {
    fn poll(&mut self, now: Duration) -> Progress {
        let mut progressed = self.accept();
        if self.fake.kill.take() {
            self.connections.clear();
            self.controllers.clear();
        }
        if self.fake.part.take() {
            for mut connection in self.connections.drain(..) {
                connection.stream.shutdown();
                self.parting.push(connection.stream);
            }
            self.controllers.clear();
        }
        self.parting.iter_mut().for_each(|stream| _ = stream.poll());
        self.parting.retain(|stream| !stream.is_quiet());
        if self.fake.read_on.take() {
            self.connections.iter_mut().for_each(|connection| connection.is_paused = false);
            self.connections.iter_mut().for_each(|connection| connection.stream.resume());
        }
        for index in 0..self.connections.len() {
            progressed |= self.serve(index, now);
        }
        let expired: Vec<u16> =
            self.controllers.iter().filter(|(_, c)| c.is_expired(now)).map(|(id, _)| *id).collect();
        for cntlid in expired {
            self.end_association(cntlid);
        }
        self.sweep();
        progressed |= self.land(now);
        if progressed { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        let due =
            self.connections.iter().flat_map(|c| c.slots.values().filter_map(|slot| slot.due));
        let early = self.connections.iter().filter_map(|c| c.early.map(|(at, ..)| at));
        let late = self.late.iter().filter_map(|slot| slot.due);
        due.chain(early)
            .chain(late)
            .chain(self.controllers.values().filter_map(Controller::deadline))
            .min()
    }
}

impl FakeTask {
    fn accept(&mut self) -> bool {
        let arrivals: Vec<Socket> = self.fake.arrivals.borrow_mut().drain(..).collect();
        let accepted = !arrivals.is_empty();
        for socket in arrivals {
            let script = self.fake.script.borrow();
            let config = TargetConfig {
                max_h2c_data: script.max_h2c_data,
                allow_header_digest: script.allows_digests,
                allow_data_digest: script.allows_digests,
                ..TargetConfig::default()
            };
            let config_stream = StreamConfig { tx_entries_max: 8192, ..StreamConfig::default() };
            let mut stream = Stream::new(&self.local, socket, config_stream).unwrap();
            let is_io = Rc::default();
            let mut is_over = false;
            if let Some(greeting) = &script.greeting {
                for part in greeting.chunks(HEAD_BYTES_MAX) {
                    stream.push(part, None, None, None).unwrap();
                }
                stream.flush();
                is_over = greeting.is_empty();
            }
            self.connections.push(Connection {
                id: self.next_connection,
                role: Role::New,
                stream,
                qpair: Target::new(config),
                slots: BTreeMap::new(),
                payloads: BTreeMap::new(),
                next_token: 0,
                first: None,
                is_paused: false,
                early: None,
                is_over,
                is_tls: self.fake.tls.borrow().is_some(),
                shaking: self.fake.tls.borrow().clone().map(|tls| tls::Shaking::new(tls, &is_io)),
                is_io,
                auth: None,
            });
            self.next_connection += 1;
        }
        accepted
    }

    fn serve(&mut self, index: usize, now: Duration) -> bool {
        let mut progressed = self.connections[index].stream.poll();
        loop {
            let connection = &mut self.connections[index];
            while let Some(token) = connection.stream.sent() {
                connection.payloads.remove(&token);
            }
            if connection.is_paused || !connection.shake() {
                break;
            }
            let is_io = matches!(connection.role, Role::Io { .. });
            let chunk = match connection.stream.recv() {
                Rx::Empty => break,
                Rx::Data(chunk) => chunk,
                end @ (Rx::Eof | Rx::Failed(_)) => {
                    connection.is_over = true;
                    let is_told = connection.stream.is_ended_in_layer();
                    let is_tls = connection.is_tls;
                    self.fake.count(|seen| match end {
                        Rx::Eof => seen.io_ends += u64::from(is_io),
                        _ => seen.io_resets += u64::from(is_io),
                    });
                    self.fake.count(|seen| {
                        seen.tls_ends += u64::from(is_tls && is_told);
                        seen.tls_cuts += u64::from(is_tls && !is_told);
                    });
                    return true;
                }
            };
            progressed = true;
            if self.fake.script.borrow().greeting.is_some() {
                continue;
            }
            let mut input: &[u8] = &chunk;
            while !self.connections[index].is_over {
                match self.connections[index].qpair.next(&mut input) {
                    Ok(Some(event)) => self.on_event(index, event, now),
                    Ok(None) => break,
                    Err(fault) => {
                        self.fake.count(|seen| seen.faults += 1);
                        let connection = &mut self.connections[index];
                        let head = connection.qpair.term_req(&fault);
                        let _ = connection.stream.push(&head, None, None, None);
                        connection.is_over = true;
                    }
                }
            }
        }
        let due: Vec<u16> = {
            let slots = self.connections[index].slots.iter();
            slots
                .filter(|(_, slot)| slot.due.is_some_and(|at| at <= now))
                .map(|(id, _)| *id)
                .collect()
        };
        for slot in due {
            progressed = true;
            self.execute(index, slot, now);
        }
        self.events(index);
        let connection = &mut self.connections[index];
        if let Some((at, slot, status)) = connection.early
            && at <= now
        {
            connection.early = None;
            connection.slots.remove(&slot);
            respond(connection, slot, status, 0);
        }
        connection.stream.flush();
        progressed
    }

    /// Asynchronous events of the controller behind an admin connection.
    fn events(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        let Role::Admin { cntlid } = connection.role else { return };
        let Some(controller) = self.controllers.get_mut(&cntlid) else { return };
        match &*self.fake.log.borrow() {
            Some(log) => controller.update_discovery(Arc::clone(log)),
            None => controller.update_subsys(Arc::clone(&self.fake.subsys.borrow())),
        }
        controller.set_health(self.fake.health.get());
        while let Some((slot, status, result)) = controller.poll_event() {
            respond(connection, slot, status, result);
        }
    }

    fn sweep(&mut self) {
        let over: Vec<Connection> = {
            let (over, live) =
                self.connections.drain(..).partition(|connection: &Connection| connection.is_over);
            self.connections = live;
            over
        };
        for mut connection in over {
            self.leave_behind(&mut connection);
            match connection.role {
                Role::Admin { cntlid } => self.end_association(cntlid),
                Role::Io { cntlid, qid } => {
                    if let Some(controller) = self.controllers.get_mut(&cntlid) {
                        controller.disconnect_io(qid);
                    }
                }
                Role::New => {}
            }
        }
    }

    fn end_association(&mut self, cntlid: u16) {
        self.controllers.remove(&cntlid);
        let is_of = |connection: &mut Connection| match connection.role {
            Role::Admin { cntlid: own } | Role::Io { cntlid: own, .. } => own == cntlid,
            Role::New => false,
        };
        let over: Vec<Connection> = self.connections.extract_if(.., is_of).collect();
        for mut connection in over {
            self.leave_behind(&mut connection);
        }
    }

    /// What a connection that has ended had under way is done nevertheless, if it is that kind of
    /// target.
    fn leave_behind(&mut self, connection: &mut Connection) {
        if !self.fake.script.borrow().lands_late || !matches!(connection.role, Role::Io { .. }) {
            return;
        }
        let slots = std::mem::take(&mut connection.slots).into_values();
        self.late.extend(slots.filter(|slot| slot.due.is_some()));
    }

    /// Does what ended connections have left behind.
    fn land(&mut self, now: Duration) -> bool {
        let due: Vec<Slot> =
            self.late.extract_if(.., |slot| slot.due.is_some_and(|at| at <= now)).collect();
        let subsys = Arc::clone(&self.fake.subsys.borrow());
        for slot in &due {
            if slot.first.as_ref().is_some_and(|(_, compare)| !self.fake.is_equal(compare)) {
                continue;
            }
            if let Ok(io) = decode(&slot.sqe, &subsys)
                && change(&mut self.fake.disk.borrow_mut(), &io, &slot.data, &subsys) == Ok(true)
            {
                self.fake.count(|seen| seen.late += 1);
            }
        }
        !due.is_empty()
    }

    fn on_event(&mut self, index: usize, event: TargetEvent<'_>, now: Duration) {
        match event {
            TargetEvent::Initialized { reply } => {
                self.connections[index].push(&reply);
            }
            TargetEvent::Command { slot, sqe, in_capsule_len } => {
                self.on_command(index, slot, Sqe::from_bytes(&sqe), in_capsule_len, now);
            }
            TargetEvent::Data { slot, offset, bytes } => {
                let command = self.connections[index].slots.get_mut(&slot).unwrap();
                command.data[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            TargetEvent::DataEnd { slot } => self.on_data(index, slot, now),
            TargetEvent::DataDigestError { slot } => {
                let connection = &mut self.connections[index];
                connection.slots.remove(&slot);
                respond(connection, slot, Status::TRANSIENT_TRANSPORT_ERROR, 0);
            }
            TargetEvent::Terminated { .. } => {
                self.fake.count(|seen| seen.term_reqs += 1);
                self.connections[index].is_over = true;
            }
        }
    }

    fn on_command(
        &mut self,
        index: usize,
        slot: u16,
        sqe: Sqe,
        in_capsule_len: u32,
        now: Duration,
    ) {
        let len = sqe.dptr.length.get();
        let is_write = sqe.direction() == Direction::ToController && len > 0;
        let connection = &mut self.connections[index];
        let mut command = Slot {
            sqe,
            data: Vec::new(),
            want: 0,
            asked: 0,
            due: None,
            other: None,
            is_held: false,
            first: None,
        };
        if let Role::Io { .. } = connection.role {
            let first = connection.first.take();
            assert_eq!(first.is_some(), Fuse::of(&sqe) == Fuse::Second, "a pair is torn apart");
            match Fuse::of(&sqe) {
                Fuse::None => {}
                Fuse::First => connection.first = Some(slot),
                Fuse::Second => {
                    command.other = first;
                    let first = first.and_then(|first| connection.slots.get_mut(&first));
                    first.expect("it waits for its second").other = Some(slot);
                    self.fake.count(|seen| seen.pairs += 1);
                }
            }
        }
        if is_write {
            command.want = len;
            command.data = vec![0; len as usize];
            command.asked = in_capsule_len;
        }
        connection.slots.insert(slot, command);
        if let Role::Io { .. } = connection.role {
            let deepest = connection.slots.len() as u64;
            self.fake.count(|seen| {
                seen.deepest = seen.deepest.max(deepest);
                seen.in_capsule += u64::from(in_capsule_len > 0);
            });
        }
        if in_capsule_len == 0 {
            self.on_data(index, slot, now);
        }
    }

    /// Asks for more data, or sets the time of execution.
    fn on_data(&mut self, index: usize, slot: u16, now: Duration) {
        let (r2t_bytes, delay_max, delay_percent, early) = {
            let script = self.fake.script.borrow();
            (script.r2t_bytes, script.delay_max, script.delay_percent, script.early)
        };
        let connection = &mut self.connections[index];
        let command = connection.slots.get_mut(&slot).unwrap();
        if command.asked < command.want {
            let len = r2t_bytes.min(command.want - command.asked);
            let head = connection.qpair.r2t(slot, command.asked, len);
            command.asked += len;
            connection.push(&head);
            self.fake.count(|seen| seen.r2ts += 1);
            if let Some(status) = early {
                // Long enough after the R2T that the host is in the middle of its data.
                connection.early = Some((now + Duration::from_millis(1), slot, status));
                connection.is_paused = true;
                connection.stream.pause();
            }
            return;
        }
        let is_io = matches!(connection.role, Role::Io { .. });
        let mut slot = slot;
        if is_io && Fuse::of(&command.sqe) != Fuse::None {
            command.is_held = true;
            let (fuse, Some(other)) = (Fuse::of(&command.sqe), command.other) else { return };
            if !connection.slots[&other].is_held {
                return;
            }
            let (first, second) = if fuse == Fuse::First { (slot, other) } else { (other, slot) };
            let command = connection.slots.remove(&first).unwrap();
            connection.slots.get_mut(&second).unwrap().first = Some((first, Box::new(command)));
            slot = second;
        }
        let command = connection.slots.get_mut(&slot).unwrap();
        let is_delayed =
            is_io && (delay_percent >= 100 || self.local.random_u64() % 100 < delay_percent);
        let spread = if is_delayed { delay_max.as_nanos() as u64 } else { 0 };
        let delay = self.local.random_u64() % (spread + 1);
        command.due = Some(now + Duration::from_nanos(delay));
        if delay == 0 {
            self.execute(index, slot, now);
        }
    }

    fn execute(&mut self, index: usize, slot: u16, now: Duration) {
        let Some(command) = self.connections[index].slots.remove(&slot) else { return };
        let sqe = command.sqe;
        if sqe.is_fabrics() && sqe.fctype() == FabricsType::CONNECT {
            return self.connect(index, slot, &command, now);
        }
        let fctypes = [FabricsType::AUTHENTICATION_SEND, FabricsType::AUTHENTICATION_RECEIVE];
        let has_secret = self.fake.script.borrow().secret.is_some();
        if has_secret && sqe.is_fabrics() && fctypes.contains(&sqe.fctype()) {
            return self.authenticate(index, slot, &command);
        }
        match self.connections[index].role {
            Role::New => self.connections[index].is_over = true,
            Role::Admin { cntlid } => self.admin(index, slot, cntlid, &command, now),
            Role::Io { cntlid, .. } => {
                if let Some(controller) = self.controllers.get_mut(&cntlid) {
                    controller.touch(now);
                }
                if let Some((first, compare)) = &command.first
                    && !self.compare(index, (*first, compare), slot)
                {
                    return;
                }
                let answer = (self.fake.script.borrow_mut().on_io)(&sqe);
                let connection = &mut self.connections[index];
                match answer {
                    Answer::Good => self.io(index, slot, &command),
                    Answer::Status(status) => respond(connection, slot, status, 0),
                    Answer::Silence => {}
                    Answer::Bytes(bytes) => {
                        for part in bytes.chunks(HEAD_BYTES_MAX) {
                            connection.push(part);
                        }
                    }
                    Answer::Close => connection.is_over = true,
                }
            }
        }
    }

    fn connect(&mut self, index: usize, slot: u16, command: &Slot, now: Duration) {
        let subsys = Arc::clone(&self.fake.subsys.borrow());
        let result = self.try_connect(index, command, &subsys, now);
        let connection = &mut self.connections[index];
        match result {
            Ok(cntlid) => {
                /// AUTHREQ: authentication is required.
                const ATR: u64 = 1 << 17;
                let asks = self.fake.script.borrow().secret.is_some();
                let asked = if asks { ATR } else { 0 };
                connection.is_io.set(matches!(connection.role, Role::Io { .. }));
                respond(connection, slot, Status::SUCCESS, u64::from(cntlid) | asked);
                let fences = self.fake.script.borrow().fences;
                if connection.role == (Role::Admin { cntlid }) && fences {
                    // The host is back: what it had before is over.
                    let id = connection.id;
                    self.connections.iter_mut().for_each(|c| c.is_over |= c.id != id);
                    self.controllers.retain(|id, _| *id == cntlid);
                }
            }
            Err(reject) => respond(connection, slot, reject.status, u64::from(reject.dw0)),
        }
    }

    fn try_connect(
        &mut self,
        index: usize,
        command: &Slot,
        subsys: &Arc<SubsystemInfo>,
        now: Duration,
    ) -> Result<u16, ConnectReject> {
        let request = ConnectRequest::parse(&command.sqe, &command.data)?;
        let script = self.fake.script.borrow();
        if let Some(reject) = if request.is_admin() { script.refuse } else { script.refuse_io } {
            return Err(reject);
        }
        if request.is_admin() {
            admit_admin(&request, subsys)?;
            let cntlid = self.next_cntlid;
            self.next_cntlid += 1;
            let config = ControllerConfig {
                cntlid,
                kind: match &*self.fake.log.borrow() {
                    Some(log) => ControllerKind::Discovery(Arc::clone(log)),
                    None => ControllerKind::Io,
                },
                hostnqn: request.hostnqn,
                hostid: request.hostid,
                kato: request.kato,
                subsys: Arc::clone(subsys),
            };
            let mut controller = Controller::new(config, now);
            controller.set_instance(Instance { ciu: 1, cirn: u64::from(cntlid) });
            self.controllers.insert(cntlid, controller);
            self.connections[index].role = Role::Admin { cntlid };
            self.fake.count(|seen| seen.associations += 1);
            return Ok(cntlid);
        }
        let controller =
            self.controllers.get_mut(&request.cntlid).ok_or(ConnectReject::UNKNOWN_CONTROLLER)?;
        controller.connect_io(&request)?;
        let connection = &mut self.connections[index];
        connection.role = Role::Io { cntlid: request.cntlid, qid: request.qid };
        let slots = request.queue_entries as u16;
        connection.qpair.set_limits(slots, subsys.limits().in_capsule_bytes);
        self.fake.count(|seen| seen.io_connects += 1);
        Ok(request.cntlid)
    }

    /// An Authentication Send or Receive.
    fn authenticate(&mut self, index: usize, slot: u16, command: &Slot) {
        let qid = match self.connections[index].role {
            Role::Io { qid, .. } => qid,
            _ => 0,
        };
        let secret = self.fake.script.borrow().secret.clone().unwrap();
        let is_send = command.sqe.fctype() == FabricsType::AUTHENTICATION_SEND;
        let connection = &mut self.connections[index];
        // A Negotiate message begins a transaction.
        if is_send && command.data.starts_with(&[0, 0]) {
            *self.fake.authentications.borrow_mut().entry(qid).or_default() += 1;
            let config = dhchap::ControllerConfig {
                hostnqn: HOSTNQN.to_owned(),
                subnqn: SUBNQN.to_owned(),
                host_keys: vec![secret],
                controller_key: None,
                expired: dhchap::Expired::default(),
                hashes: vec![Hash::Sha256],
                groups: vec![DhGroup::Null],
                concatenation: Concatenation::No,
            };
            connection.auth = Some(dhchap::Controller::new(config, &[7; ENTROPY_LEN]));
        }
        (self.fake.script.borrow_mut().on_auth)(qid);
        let auth = connection.auth.as_mut().unwrap();
        if is_send {
            assert!(auth.on_message(&command.data).is_none(), "there is no group");
            return respond(connection, slot, Status::SUCCESS, 0);
        }
        let mut message = auth.next_message().unwrap();
        message.resize(command.sqe.dptr.length.get() as usize, 0);
        send_data(&self.local, connection, slot, &message, u32::MAX, false, 0);
    }

    fn admin(&mut self, index: usize, slot: u16, cntlid: u16, command: &Slot, now: Duration) {
        let Some(controller) = self.controllers.get_mut(&cntlid) else {
            self.connections[index].is_over = true;
            return;
        };
        let is_keep_alive = command.sqe.opcode == 0x18;
        if is_keep_alive {
            self.fake.count(|seen| seen.keep_alives += 1);
            if self.fake.script.borrow().is_admin_mute {
                return;
            }
        }
        let mut out = Vec::new();
        let outcome = controller.admin(slot, &command.sqe, &command.data, &mut out, now);
        let (status, result) = match outcome {
            AdminOutcome::Complete { status, result } => (status, result),
            AdminOutcome::ResetQueues { status, result, shutdown } => {
                controller.queues_closed(now);
                self.fake.count(|seen| seen.shutdowns += u64::from(shutdown));
                self.connections.iter_mut().for_each(|connection| {
                    connection.is_over |=
                        matches!(connection.role, Role::Io { cntlid: own, .. } if own == cntlid);
                });
                (status, result)
            }
            // `connect` has ended whatever it names.
            AdminOutcome::CrossReset { .. } if self.fake.script.borrow().fences => {
                (Status::INVALID_CONTROLLER_IDENTIFIER.dnr(), 0)
            }
            AdminOutcome::CrossReset { .. } => (Status::INTERNAL_ERROR, 0),
            // An event request, answered by `events`.
            AdminOutcome::Pending => return,
            outcome => unreachable!("the initiator does not ask for that: {outcome:?}"),
        };
        let connection = &mut self.connections[index];
        if out.is_empty() {
            respond(connection, slot, status, result);
        } else {
            send_data(&self.local, connection, slot, &out, u32::MAX, result == 0, result);
        }
    }

    /// The first of a pair. `false`: the second is not carried out.
    fn compare(&mut self, index: usize, (first, compare): (u16, &Slot), second: u16) -> bool {
        let answer = (self.fake.script.borrow_mut().on_io)(&compare.sqe);
        let connection = &mut self.connections[index];
        let status = match answer {
            Answer::Good if self.fake.is_equal(compare) => Status::SUCCESS,
            Answer::Good => Status::COMPARE_FAILURE.dnr(),
            Answer::Status(status) => status,
            Answer::Silence => return false,
            Answer::Bytes(_) | Answer::Close => {
                connection.is_over = true;
                return false;
            }
        };
        respond(connection, first, status, 0);
        if !status.is_success() {
            respond(connection, second, Status::ABORTED_FAILED_FUSED.dnr(), 0);
        }
        status.is_success()
    }

    fn io(&mut self, index: usize, slot: u16, command: &Slot) {
        let fake = Rc::clone(&self.fake);
        let subsys = Arc::clone(&fake.subsys.borrow());
        let connection = &mut self.connections[index];
        let io = match decode(&command.sqe, &subsys) {
            Ok(io) => io,
            Err(status) => return respond(connection, slot, status, 0),
        };
        let mut disk = fake.disk.borrow_mut();
        fake.count(|seen| {
            match io {
                IoCommand::Read { .. } => seen.reads += 1,
                IoCommand::Write { .. } => seen.writes += 1,
                IoCommand::Flush { .. } => seen.flushes += 1,
                IoCommand::WriteZeroes { .. } => seen.write_zeroes += 1,
                IoCommand::Deallocate { .. } => seen.deallocates += 1,
                _ => {}
            }
            if let IoCommand::Read { len, fua, .. } | IoCommand::Write { len, fua, .. } = io {
                seen.longest_bytes = seen.longest_bytes.max(u64::from(len));
                seen.fua += u64::from(fua);
            }
        });
        match io {
            IoCommand::Read { offset, len, .. } => {
                let script = fake.script.borrow();
                let bytes = &disk[offset as usize..][..len as usize];
                let (pdu_bytes, success) = (script.c2h_bytes, script.uses_success);
                return send_data(&self.local, connection, slot, bytes, pdu_bytes, success, 0);
            }
            IoCommand::Compare { offset, len, .. } => {
                if disk[offset as usize..][..len as usize] != command.data[..] {
                    return respond(connection, slot, Status::COMPARE_FAILURE.dnr(), 0);
                }
            }
            IoCommand::Flush { .. } | IoCommand::Advisory { .. } | IoCommand::Verify { .. } => {}
            _ => match change(&mut disk, &io, &command.data, &subsys) {
                Ok(true) => {}
                // The initiator sends no others.
                Ok(false) => {
                    return respond(connection, slot, Status::INVALID_COMMAND_OPCODE.dnr(), 0);
                }
                Err(status) => return respond(connection, slot, status, 0),
            },
        }
        respond(connection, slot, Status::SUCCESS, 0);
    }
}

/// Does a command to the disk. `Ok(false)`: it changes nothing.
fn change(
    disk: &mut [u8],
    io: &IoCommand,
    data: &[u8],
    subsys: &SubsystemInfo,
) -> Result<bool, Status> {
    let namespace = subsys.namespaces().first().unwrap();
    match *io {
        IoCommand::Write { offset, len, .. } => {
            disk[offset as usize..][..len as usize].copy_from_slice(data);
        }
        IoCommand::WriteZeroes { offset, len, .. } => {
            disk[offset as usize..][..len as usize].fill(0);
        }
        IoCommand::Deallocate { ranges, .. } => {
            for range in data.chunks(DSM_RANGE_LEN as usize).take(ranges.into()) {
                let (offset, len) = dsm_range(range.try_into().unwrap(), namespace)?;
                disk[offset as usize..][..len as usize].fill(0);
            }
        }
        IoCommand::Copy { offset, ranges, .. } => {
            let mut to = offset as usize;
            for range in data.chunks(COPY_RANGE_LEN as usize).take(ranges.into()) {
                let (from, len) = copy_range(range.try_into().unwrap(), namespace)?;
                disk.copy_within(from as usize..(from + len) as usize, to);
                to += len as usize;
            }
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn respond(connection: &mut Connection, slot: u16, status: Status, result: u64) {
    let cqe = Cqe::new(connection.qpair.cid(slot), status, result).to_bytes();
    let head = connection.qpair.response(slot, &cqe);
    connection.qpair.release(slot);
    connection.push(&head);
}

/// Sends `bytes` in PDUs of at most `pdu_bytes`, then the response unless the data says it all.
fn send_data(
    local: &Local,
    connection: &mut Connection,
    slot: u16,
    bytes: &[u8],
    pdu_bytes: u32,
    uses_success: bool,
    result: u64,
) {
    let mut offset = 0;
    for part in bytes.chunks(pdu_bytes as usize) {
        let is_last = offset + part.len() == bytes.len();
        let head = connection.qpair.c2h_data(
            slot,
            offset as u32,
            part.len() as u32,
            is_last,
            is_last && uses_success,
        );
        let mut payload = SgList::default();
        local.pool().alloc(part.len(), &mut payload).unwrap();
        payload.copy_from_slice(0, part).unwrap();
        let tail = connection.qpair.data_digest().then(|| Crc32c::of(part));
        let token = connection.next_token;
        connection.next_token += 1;
        let pushed =
            connection.stream.push(&head, Some((&payload, 0, part.len())), tail, Some(token));
        if pushed.is_err() {
            connection.is_over = true;
            return;
        }
        connection.payloads.insert(token, payload);
        offset += part.len();
    }
    if uses_success {
        connection.qpair.release(slot);
    } else {
        respond(connection, slot, Status::SUCCESS, result);
    }
}

/// For scripts: the opcode of a command.
pub fn is_op(sqe: &Sqe, opcode: NvmOpcode) -> bool {
    sqe.opcode == opcode.0
}
