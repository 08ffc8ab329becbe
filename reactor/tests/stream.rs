//! Streams on real sockets: TCP over loopback and Unix socket pairs.

#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]
#![expect(unsafe_code, reason = "a reset is provoked by a socket option; memory is counted")]

mod support;

use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use iobuf::{Hold, Segment, SgList};
use reactor::net::{
    Gather, HEAD_BYTES_MAX, Layer, LayerError, Plain, Rx, RxChunk, Stream, StreamConfig,
};
use reactor::{Core, CoreConfig, Errno, Full, Local, Socket};
use support::xor::Xor;
use support::{content, core, core_with, list, pattern, small, until};

/// More than the sockets of these tests take while nobody reads them.
const MORE_THAN_A_SOCKET: usize = 1 << 20;

fn unix() -> [Socket; 2] {
    let (a, b) = UnixStream::pair().unwrap();
    [a.into(), b.into()]
}

fn tcp_raw() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn tcp() -> [Socket; 2] {
    let (a, b) = tcp_raw();
    [a.into(), b.into()]
}

fn streams(local: &Local, sockets: [Socket; 2], layers: bool) -> [Stream; 2] {
    sockets.map(|socket| {
        let layer = layers.then(|| Box::new(Xor::default()) as Box<dyn Layer>);
        let config = StreamConfig { tx_entries_max: 32, layer, ..StreamConfig::default() };
        Stream::new(local, socket, config).unwrap()
    })
}

/// What arrives until there are `len` bytes.
fn receive(
    core: &mut Core,
    stream: &mut Stream,
    sender: Option<&mut Stream>,
    len: usize,
) -> Vec<u8> {
    let mut sender = sender;
    let mut bytes = Vec::with_capacity(len);
    until(core, || {
        if let Some(sender) = sender.as_deref_mut() {
            sender.poll();
        }
        stream.poll();
        loop {
            match stream.recv() {
                Rx::Data(chunk) => bytes.extend_from_slice(&chunk),
                Rx::Empty => break,
                other => panic!("{other:?} after {} bytes", bytes.len()),
            }
        }
        (bytes.len() >= len).then_some(())
    });
    assert_eq!(bytes.len(), len);
    bytes
}

/// Pushes PDUs of many shapes and checks bytes, tokens and memory on the other side.
fn exchange(core: Core, sockets: [Socket; 2], layers: bool) {
    exchange_pdus(core, sockets, layers, 200);
}

fn exchange_pdus(mut core: Core, sockets: [Socket; 2], layers: bool, rounds: u32) {
    let local = core.local();
    let [mut near, mut far] = streams(&local, sockets, layers);
    let mut expected = Vec::new();
    let mut received = Vec::new();
    let (mut pushed, mut sent) = (0u32, 0u32);
    let payload_lens = [0, 1, 24, 512, 4096, 70_000, 300_000];
    until(&mut core, || {
        while pushed < rounds && near.room() > 0 {
            let head = pattern(1 + (pushed as usize * 7) % HEAD_BYTES_MAX, pushed.into());
            let len = payload_lens[pushed as usize % payload_lens.len()];
            let data = pattern(len + 20, u64::from(pushed) + 1);
            let tail = (pushed % 3 == 0).then_some(pushed.to_le_bytes());
            let sg = list(&local, &data);
            let payload = (len > 0).then_some((&sg, 10, len));
            near.push(&head, payload, tail, Some(pushed)).unwrap();
            expected.extend_from_slice(&head);
            expected.extend_from_slice(&data[10..10 + len]);
            expected.extend(tail.into_iter().flatten());
            pushed += 1;
        }
        near.flush();
        near.poll();
        far.poll();
        while let Some(token) = near.sent() {
            assert_eq!(token, sent);
            sent += 1;
        }
        while let Rx::Data(chunk) = far.recv() {
            received.extend_from_slice(&chunk);
        }
        (sent == rounds && received.len() == expected.len()).then_some(())
    });
    assert!(received == expected, "bytes differ");
    assert!(!near.is_sending());
    assert_eq!(local.pool().available(), local.pool().capacity());
}

#[test]
fn pdus_arrive_whole_and_in_order() {
    exchange(core(), unix(), false);
    exchange(core(), tcp(), false);
}

#[test]
fn pdus_arrive_through_buffers_used_up_piece_by_piece() {
    let config = CoreConfig { rx_incremental: true, ..small() };
    exchange(core_with(config.clone()), unix(), false);
    exchange(core_with(config), tcp(), true);
}

#[test]
fn a_record_layer_sits_in_between() {
    exchange(core(), unix(), true);
    exchange(core(), tcp(), true);
}

#[test]
fn few_tiny_buffers_are_enough() {
    for rx_incremental in [false, true] {
        for layers in [false, true] {
            let tiny = CoreConfig { rx_buffers: 1, rx_buffer_bytes: 64, ..small() };
            let core = core_with(CoreConfig { rx_incremental, ..tiny });
            exchange_pdus(core, unix(), layers, 14);
        }
    }
}

/// What has arrived when the layer comes, and what the owner took too much, goes through it.
#[test]
fn a_layer_is_put_on_a_stream_that_was_plain() {
    let mut core = core();
    let local = core.local();
    let [mut near, mut far] = streams(&local, unix(), false);
    let hello = pattern(MORE_THAN_A_SOCKET, 5);
    near.push(&[], Some((&list(&local, &hello), 0, hello.len())), None, Some(1)).unwrap();
    near.flush();
    let layer = near.set_layer(Box::new(Xor::default()), b"").unwrap_err().0;
    let mut layer = Some(layer);
    let mut raw = Vec::new();
    until(&mut core, || {
        near.poll();
        if let Rx::Data(chunk) = far.recv() {
            raw.extend_from_slice(&chunk);
        }
        let result = near.set_layer(layer.take().unwrap(), b"");
        layer = result.err().map(|pending| pending.0);
        layer.is_none().then_some(())
    });
    let text = pattern(3000, 1);
    near.push(&[], Some((&list(&local, &text), 0, text.len())), None, None).unwrap();
    near.flush();
    // All of it is at the far end, which knows of no layer yet.
    let framed = text.len() + 3 * 4;
    until(&mut core, || {
        near.poll();
        far.poll();
        if raw.len() < hello.len()
            && let Rx::Data(chunk) = far.recv()
        {
            raw.extend_from_slice(&chunk);
        }
        (raw.len() >= hello.len() && !near.is_sending()).then_some(())
    });
    let leftover = raw.split_off(hello.len());
    assert!(raw == hello, "bytes differ");
    assert!(leftover.len() <= framed);
    far.set_layer(Box::new(Xor::default()), &leftover).unwrap();
    assert!(receive(&mut core, &mut far, Some(&mut near), text.len()) == text, "bytes differ");
}

/// What comes next is opened to where it belongs as long as it is in one piece, and comes out of `recv`
/// otherwise: together it is everything, once.
#[test]
fn a_layer_opens_into_place() {
    for rx_buffer_bytes in [256, 5000, 256 << 10] {
        let mut core = core_with(CoreConfig { rx_buffer_bytes, ..small() });
        let local = core.local();
        let [mut near, mut far] = streams(&local, tcp(), true);
        let data = pattern(200_000, 9);
        let to = list(&local, &vec![0xEE; data.len()]);
        near.push(b"head", Some((&list(&local, &data), 0, data.len())), None, Some(1)).unwrap();
        near.flush();
        let (mut head, mut done, mut placed) = (Vec::new(), 0, 0);
        until(&mut core, || {
            near.poll();
            far.poll();
            loop {
                // Room for less than there is, at times: what does not fit waits or comes out.
                let room = (data.len() - done).min(if done % 3 == 0 { 2500 } else { 90_000 });
                if head.len() == 4 && room > 0 {
                    let count = far.recv_to(&to, done, room);
                    (done, placed) = (done + count, placed + count);
                }
                match far.recv() {
                    Rx::Empty => break,
                    Rx::Data(chunk) => {
                        let (first, rest) = chunk.split_at(chunk.len().min(4 - head.len()));
                        head.extend_from_slice(first);
                        to.copy_from_slice(done, rest).unwrap();
                        done += rest.len();
                    }
                    other => panic!("{other:?} after {done} bytes"),
                }
            }
            (done == data.len()).then_some(())
        });
        assert_eq!(head, b"head");
        assert!(content(&to) == data, "bytes differ");
        assert_eq!(
            placed > 0,
            rx_buffer_bytes > 1004,
            "frames are longer than the smallest buffer"
        );
        assert_eq!(far.recv_to(&to, 0, 10), 0);
        assert!(matches!(far.recv(), Rx::Empty));
    }
}

#[test]
fn without_a_layer_nothing_is_opened_into_place() {
    let mut core = core();
    let local = core.local();
    let [mut near, mut far] = streams(&local, unix(), false);
    near.push(b"text", None, None, None).unwrap();
    near.flush();
    let to = list(&local, &[1; 4]);
    until(&mut core, || {
        far.poll();
        assert_eq!(far.recv_to(&to, 0, 4), 0);
        far.wants_turn().then_some(())
    });
    assert_eq!(receive(&mut core, &mut far, None, 4), b"text");
    assert_eq!(content(&to), [1; 4]);
}

#[test]
fn junk_fails_a_layer_that_opens_into_place() {
    let mut core = core();
    let (mut raw, socket) = UnixStream::pair().unwrap();
    let layer = Some(Box::new(Xor::default()) as Box<dyn Layer>);
    let config = StreamConfig { layer, ..StreamConfig::default() };
    let mut stream = Stream::new(&core.local(), socket.into(), config).unwrap();
    raw.write_all(b"X\0\0\x04goodXYjunk").unwrap();
    let to = list(&core.local(), &[1; 100]);
    let mut placed = 0;
    until(&mut core, || {
        stream.poll();
        placed += stream.recv_to(&to, placed, 100 - placed);
        stream.failed()
    });
    assert!(matches!(stream.recv(), Rx::Failed(Errno::BAD_MESSAGE)));
    assert_eq!(stream.recv_to(&to, placed, 100 - placed), 0, "the layer is not called again");
}

#[test]
fn a_layer_tells_a_peer_whose_records_are_wrong() {
    let mut core = core();
    let (mut raw, socket) = UnixStream::pair().unwrap();
    let layer: Option<Box<dyn Layer>> = Some(Box::new(Xor::default()));
    let config = StreamConfig { layer, ..StreamConfig::default() };
    let mut stream = Stream::new(&core.local(), socket.into(), config).unwrap();
    raw.write_all(b"rubbish").unwrap();
    until(&mut core, || {
        assert!(matches!(stream.recv(), Rx::Empty | Rx::Failed(Errno::BAD_MESSAGE)));
        (stream.failed().is_some() && stream.is_quiet()).then_some(())
    });
    drop(stream);
    let mut told = Vec::new();
    raw.read_to_end(&mut told).unwrap();
    assert_eq!(told, b"not a frame");
}

#[test]
fn what_the_socket_takes_leaves_with_the_flush() {
    let mut core = core();
    let local = core.local();
    for sockets in [unix(), tcp()] {
        let [mut near, mut far] = streams(&local, sockets, false);
        let sg = list(&local, &[7; 5000]);
        let free = local.pool().available();
        near.push(b"head", Some((&sg, 0, 5000)), None, Some(1)).unwrap();
        drop(sg);
        assert_eq!(local.pool().available(), free);
        near.flush();
        // Without a turn of the core: told, and the memory is back.
        assert_eq!(near.sent(), Some(1));
        assert!(!near.is_sending() && local.pool().available() > free);
        assert_eq!(receive(&mut core, &mut far, None, 5004), [&b"head"[..], &[7; 5000]].concat());
    }
}

#[test]
fn a_flush_to_a_peer_that_is_gone_fails_and_gives_everything_back() {
    let core = core();
    let local = core.local();
    let [near, far] = unix();
    let mut near = Stream::new(&local, near, StreamConfig::default()).unwrap();
    drop(far);
    near.push(b"lost", None, None, Some(1)).unwrap();
    near.flush();
    assert!(near.failed().is_some() && near.wants_turn());
    assert_eq!(near.sent(), Some(1));
}

#[test]
fn pushes_during_a_send_go_with_the_next() {
    let mut core = core();
    let local = core.local();
    let [mut near, mut far] = streams(&local, unix(), false);
    let first = pattern(MORE_THAN_A_SOCKET, 3);
    near.push(&[], Some((&list(&local, &first), 0, first.len())), None, Some(1)).unwrap();
    near.flush();
    assert!(near.is_sending() && near.sent().is_none());
    // The kernel has the rest of the first; these wait and need no flush of their own.
    near.push(b"second ", None, None, Some(2)).unwrap();
    near.push(b"third", None, None, Some(3)).unwrap();
    let all = [&first[..], b"second third"].concat();
    assert!(receive(&mut core, &mut far, Some(&mut near), all.len()) == all, "bytes differ");
    let mut tokens = Vec::new();
    until(&mut core, || {
        near.poll();
        tokens.extend(near.sent());
        (tokens.len() == 3).then_some(())
    });
    assert_eq!(tokens, [1, 2, 3]);
}

#[test]
fn the_queue_is_bounded() {
    let core = core();
    let [mut near, _far] = streams(&core.local(), unix(), false);
    let room = near.room();
    assert_eq!(room, 32);
    for token in 0..room {
        near.push(&[1; HEAD_BYTES_MAX], None, Some([2; 4]), Some(token as u32)).unwrap();
    }
    assert_eq!(near.room(), 0);
    assert_eq!(near.push(b"x", None, None, None), Err(Full));
}

#[test]
fn a_peer_that_does_not_read_stops_the_sender_and_nothing_is_lost() {
    let mut core = core();
    let local = core.local();
    let (mut raw, socket) = UnixStream::pair().unwrap();
    let mut stream = Stream::new(&local, socket.into(), StreamConfig::default()).unwrap();
    let data = pattern(1 << 20, 3);
    let sg = list(&local, &data);
    stream.push(b"head", Some((&sg, 0, data.len())), None, Some(1)).unwrap();
    stream.flush();
    for _ in 0..100 {
        core.turn(false);
        stream.poll();
    }
    assert_eq!(stream.sent(), None);
    assert!(stream.is_sending());
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 4 + (1 << 20)];
        raw.read_exact(&mut bytes).unwrap();
        bytes
    });
    until(&mut core, || {
        stream.poll();
        stream.sent()
    });
    assert_eq!(content(&sg), data);
    let bytes = reader.join().unwrap();
    assert!(bytes[..4] == *b"head" && bytes[4..] == data);
}

#[test]
fn after_shutdown_and_quiet_nothing_more_is_sent() {
    let mut core = core();
    let local = core.local();
    let (mut raw, socket) = UnixStream::pair().unwrap();
    let mut stream = Stream::new(&local, socket.into(), StreamConfig::default()).unwrap();
    let sg = list(&local, &vec![1; 1 << 20]);
    for token in 0..3 {
        stream.push(&[], Some((&sg, 0, sg.len())), None, Some(token)).unwrap();
    }
    stream.flush();
    core.turn(false);
    assert!(!stream.is_quiet());
    stream.shutdown();
    let mut tokens = Vec::new();
    until(&mut core, || {
        stream.poll();
        tokens.extend(std::iter::from_fn(|| stream.sent()));
        stream.is_quiet().then_some(())
    });
    tokens.sort();
    assert_eq!(tokens, [0, 1, 2]);
    // Whatever happens to the memory now, the peer cannot see it.
    sg.fill(0, sg.len(), 2).unwrap();
    assert_eq!(stream.push(b"x", None, None, None), Err(Full));
    assert_eq!(stream.room(), 0);
    drop(stream);
    let mut bytes = Vec::new();
    let rest = raw.read_to_end(&mut bytes);
    assert!(rest.is_ok() && bytes.len() < 3 << 20 && bytes.iter().all(|byte| *byte == 1));
}

#[test]
fn a_paused_stream_receives_nothing() {
    let mut core = core();
    let (mut raw, socket) = UnixStream::pair().unwrap();
    let mut stream = Stream::new(&core.local(), socket.into(), StreamConfig::default()).unwrap();
    raw.write_all(b"before").unwrap();
    assert_eq!(receive(&mut core, &mut stream, None, 6), b"before");
    stream.pause();
    // Turn until the cancelled receive is over: then nothing is left to complete.
    let mut turns = 0;
    until(&mut core, || {
        turns += 1;
        (!stream.poll() && turns > 10).then_some(())
    });
    raw.write_all(b"after").unwrap();
    for _ in 0..10 {
        core.turn(false);
        assert!(matches!(stream.recv(), Rx::Empty));
    }
    stream.resume();
    assert_eq!(receive(&mut core, &mut stream, None, 5), b"after");
    // Changing one's mind while the cancellation is under way is fine, too.
    for _ in 0..5 {
        stream.pause();
        stream.resume();
    }
    raw.write_all(b"again").unwrap();
    assert_eq!(receive(&mut core, &mut stream, None, 5), b"again");
}

#[test]
fn the_end_of_the_stream_comes_after_its_data() {
    let mut core = core();
    for socket_pair in [unix(), tcp()] {
        let local = core.local();
        let [mut near, mut far] = streams(&local, socket_pair, false);
        near.push(b"farewell", None, None, Some(0)).unwrap();
        near.flush();
        until(&mut core, || {
            near.poll();
            near.sent()
        });
        drop(near);
        assert_eq!(receive(&mut core, &mut far, None, 8), b"farewell");
        until(&mut core, || matches!(far.recv(), Rx::Eof).then_some(()));
    }
}

#[test]
fn a_reset_is_a_failure_and_gives_tokens_back() {
    let mut core = core();
    let local = core.local();
    let (raw, socket) = tcp_raw();
    let mut stream = Stream::new(&local, socket.into(), StreamConfig::default()).unwrap();
    assert!(stream.peer().starts_with("127.0.0.1:"));
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: pointer and length name `linger`.
    let result = unsafe {
        libc::setsockopt(
            raw.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger) as u32,
        )
    };
    assert_eq!(result, 0);
    let sg = list(&local, &vec![1; 3 << 20]);
    for token in 0..4 {
        stream.push(b"head", Some((&sg, 0, sg.len())), None, Some(token)).unwrap();
    }
    stream.flush();
    core.turn(false);
    drop(raw);
    let mut tokens = Vec::new();
    until(&mut core, || {
        stream.poll();
        tokens.extend(std::iter::from_fn(|| stream.sent()));
        (tokens.len() == 4).then_some(())
    });
    let errno = stream.failed().unwrap();
    assert!(errno == Errno::CONNECTION_RESET || errno == Errno(libc::EPIPE), "{errno:?}");
    assert!(matches!(stream.recv(), Rx::Failed(same) if same == errno));
    stream.shutdown();
    until(&mut core, || {
        stream.poll();
        stream.is_quiet().then_some(())
    });
}

#[test]
fn junk_fails_the_record_layer() {
    let mut core = core();
    let (mut raw, socket) = UnixStream::pair().unwrap();
    let layer = Some(Box::new(Xor::default()) as Box<dyn Layer>);
    let config = StreamConfig { layer, ..StreamConfig::default() };
    let mut stream = Stream::new(&core.local(), socket.into(), config).unwrap();
    raw.write_all(b"XYjunk").unwrap();
    let errno = until(&mut core, || match stream.recv() {
        Rx::Failed(errno) => Some(errno),
        Rx::Empty => None,
        other => panic!("{other:?}"),
    });
    assert_eq!(errno, Errno::BAD_MESSAGE);
    assert_eq!(stream.push(b"x", None, None, None), Err(Full));
}

#[test]
fn a_stream_is_not_starved_by_one_that_sits_on_all_buffers() {
    let mut core = core_with(CoreConfig { rx_buffers: 2, rx_buffer_bytes: 256, ..small() });
    let local = core.local();
    let (mut hog_raw, hog_socket) = UnixStream::pair().unwrap();
    let (mut raw, socket) = UnixStream::pair().unwrap();
    let mut hog = Stream::new(&local, hog_socket.into(), StreamConfig::default()).unwrap();
    let mut stream = Stream::new(&local, socket.into(), StreamConfig::default()).unwrap();
    hog_raw.write_all(&[1; 512]).unwrap();
    let mut held: Vec<RxChunk> = Vec::new();
    until(&mut core, || {
        if let Rx::Data(chunk) = hog.recv() {
            held.push(chunk);
        }
        (held.iter().map(|chunk| chunk.len()).sum::<usize>() == 512).then_some(())
    });
    let data = pattern(100_000, 5);
    let writer = std::thread::spawn(move || {
        raw.write_all(&pattern(100_000, 5)).unwrap();
        raw
    });
    assert_eq!(receive(&mut core, &mut stream, None, 100_000), data);
    // The buffers come back, and so does the ordinary way.
    held.clear();
    let mut raw = writer.join().unwrap();
    raw.write_all(b"end").unwrap();
    assert_eq!(receive(&mut core, &mut stream, None, 3), b"end");
}

#[test]
fn more_completions_than_the_queue_holds_are_not_lost() {
    // 16 completions fit; what arrived while the core slept needs 64.
    let config = CoreConfig { entries: 4, rx_buffers: 64, rx_buffer_bytes: 64, ..small() };
    let mut core = core_with(config);
    let pairs = [(); 3].map(|()| UnixStream::pair().unwrap());
    let mut raws = Vec::new();
    let mut streams: Vec<_> = pairs
        .into_iter()
        .map(|(raw, socket)| {
            raws.push(raw);
            Stream::new(&core.local(), socket.into(), StreamConfig::default()).unwrap()
        })
        .collect();
    core.turn(false);
    let data = pattern(20 * 64, 9);
    for _ in 0..20 {
        for raw in &mut raws {
            raw.write_all(&data).unwrap();
        }
        core.turn(true);
        for stream in &mut streams {
            assert!(receive(&mut core, stream, None, data.len()) == data);
        }
    }
}

/// Memory whose users are counted.
struct Counted {
    bytes: Box<[u8]>,
    uses: Cell<i32>,
    gone: Rc<Cell<bool>>,
}

impl Hold for Counted {
    fn retain(&self, segments: &[Segment]) {
        self.uses.set(self.uses.get() + segments.len() as i32);
    }
    fn release(&self, segments: &[Segment]) {
        self.uses.set(self.uses.get() - segments.len() as i32);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        assert_eq!(self.uses.get(), 0);
        self.gone.set(true);
    }
}

#[test]
fn a_dropped_stream_keeps_payload_until_the_kernel_is_done() {
    let mut core = core();
    let (_raw, socket) = UnixStream::pair().unwrap();
    let mut stream = Stream::new(&core.local(), socket.into(), StreamConfig::default()).unwrap();
    let gone = Rc::new(Cell::new(false));
    let mut memory =
        Counted { bytes: vec![1; 4 << 20].into(), uses: Cell::new(1), gone: Rc::clone(&gone) };
    let segment = Segment::new(memory.bytes.as_mut_ptr(), memory.bytes.len());
    let mut sg = SgList::default();
    // SAFETY: the bytes live as long as the hold, and one use was counted for the list.
    unsafe { sg.append(&Rc::new(memory), segment) };
    for token in 0..2 {
        stream.push(b"head", Some((&sg, 0, sg.len())), None, Some(token)).unwrap();
    }
    stream.flush();
    core.turn(false);
    drop(sg);
    drop(stream);
    assert!(!gone.get(), "the kernel still reads");
    until(&mut core, || gone.get().then_some(()));
}

#[test]
fn a_core_without_free_slots_sends_later() {
    let mut core = core_with(CoreConfig { entries: 4, ..small() });
    let local = core.local();
    let [mut near, mut far] = streams(&local, unix(), false);
    let mut port = local.port();
    let (reader, _writer) = std::io::pipe().unwrap();
    let fd = reactor::Fd::from(std::os::fd::OwnedFd::from(reader));
    let sg = list(&local, &[0; 8]);
    while port.readv(&fd, 0, &sg, 1).is_ok() {}
    // The socket takes a part at once; the rest needs a slot.
    let late = pattern(MORE_THAN_A_SOCKET, 4);
    near.push(&[], Some((&list(&local, &late), 0, late.len())), None, Some(1)).unwrap();
    near.flush();
    for _ in 0..5 {
        core.turn(false);
        near.poll();
    }
    assert!(near.is_sending() && near.sent().is_none() && near.failed().is_none());
    port.cancel_all();
    assert!(receive(&mut core, &mut far, Some(&mut near), late.len()) == late, "bytes differ");
}

/// A layer that changes nothing and has a last word.
#[derive(Default)]
struct Polite {
    is_ended: bool,
}

const LAST_WORD: &[u8] = b"bye";

impl Layer for Polite {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        plain.append_to(0, plain.len(), out).map_err(|_| LayerError("short"))
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        self.is_ended |= wire.ends_with(LAST_WORD);
        sink(Plain::InPlace(0..wire.len()));
        Ok(())
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(LAST_WORD);
    }

    fn is_ended(&self) -> bool {
        self.is_ended
    }
}

/// A layer that can seal so many more messages, and says so when it cannot.
struct Worn(usize);

impl Layer for Worn {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        self.0 = self.0.checked_sub(1).ok_or(LayerError("worn out"))?;
        plain.append_to(0, plain.len(), out).map_err(|_| LayerError("short"))
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        sink(Plain::InPlace(0..wire.len()));
        Ok(())
    }

    fn farewell(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(LAST_WORD);
    }
}

#[test]
fn a_layer_that_cannot_seal_any_more_says_so_to_the_peer() {
    let mut core = core();
    let local = core.local();
    let (near, mut far) = tcp_raw();
    let layer = Some(Box::new(Worn(1)) as Box<dyn Layer>);
    let config = StreamConfig { layer, ..StreamConfig::default() };
    let mut stream = Stream::new(&local, near.into(), config).unwrap();
    for data in [b"data", b"more"] {
        stream.push(data, None, None, None).unwrap();
        stream.flush();
    }
    assert_eq!(stream.failed(), Some(Errno::BAD_MESSAGE));
    stream.shutdown();
    until(&mut core, || {
        stream.poll();
        stream.is_quiet().then_some(())
    });
    drop(stream);
    core.turn(false);
    let mut all = Vec::new();
    far.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"databye");
}

fn polite(local: &Local, socket: Socket) -> Stream {
    let layer = Some(Box::new(Polite::default()) as Box<dyn Layer>);
    Stream::new(local, socket, StreamConfig { layer, ..StreamConfig::default() }).unwrap()
}

#[test]
fn the_last_word_leaves_at_once_and_the_connection_ends_in_order() {
    let mut core = core();
    let local = core.local();
    for resets in [true, false] {
        let (near, mut far) = tcp_raw();
        let socket = Socket::from(near);
        socket.set_reset_on_close().unwrap();
        let mut stream = polite(&local, socket);
        stream.push(b"data", None, None, None).unwrap();
        stream.flush();
        stream.set_reset_on_close(resets).unwrap();
        stream.shutdown();
        // Nobody has to turn the core for that: its owner may be gone.
        let mut bytes = [0; 7];
        far.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, *b"databye");
        until(&mut core, || {
            stream.poll();
            stream.is_quiet().then_some(())
        });
        drop(stream);
        core.turn(false);
        let end = far.read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(end, if resets { Err(ErrorKind::ConnectionReset) } else { Ok(0) });
    }
}

#[test]
fn an_end_in_the_layer_is_told_apart_from_one_outside() {
    let mut core = core();
    let local = core.local();
    for word in [LAST_WORD, b"data"] {
        let (near, mut far) = tcp_raw();
        let mut stream = polite(&local, near.into());
        far.write_all(word).unwrap();
        if word != LAST_WORD {
            far.shutdown(std::net::Shutdown::Write).unwrap();
        }
        until(&mut core, || match stream.recv() {
            Rx::Data(_) | Rx::Empty => None,
            Rx::Eof => Some(()),
            Rx::Failed(errno) => panic!("{errno:?}"),
        });
        assert_eq!(stream.is_ended_in_layer(), word == LAST_WORD);
    }
}
