use std::os::unix::net::UnixStream;

use super::*;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn listening_has_the_mode_asked_for_and_leaves_nothing() {
    let folder = folder();
    let path = folder.path().join("a.sock");
    for mode in [0o600, 0o660] {
        let listener = Listener::new(&path, mode).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, mode);
        assert!(listener.accept().unwrap().is_none());
        let client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop((listener, client));
        assert!(!path.exists());
    }
}

#[test]
fn only_an_unused_socket_is_replaced() {
    let folder = folder();
    let path = folder.path().join("a.sock");
    // Left behind by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::new(&path, 0o600).unwrap();

    let error = Listener::new(&path, 0o600).unwrap_err();
    assert!(matches!(error, ListenError::InUse { .. }), "{error}");
    assert!(UnixStream::connect(&path).is_ok(), "it was left alone");
    // Another one has taken the name: it is not ours to remove.
    fs::remove_file(&path).unwrap();
    let other = Listener::new(&path, 0o600).unwrap();
    drop(listener);
    assert!(path.exists());
    drop(other);
    assert!(!path.exists());

    fs::write(&path, "precious").unwrap();
    let error = Listener::new(&path, 0o600).unwrap_err();
    assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn bad_paths_have_a_reason() {
    let folder = folder();
    let long = folder.path().join("x".repeat(120));
    let error = Listener::new(&long, 0o600).unwrap_err().to_string();
    assert!(error.contains("xxx"), "{error}");
    let nowhere = folder.path().join("no").join("such");
    let error = Listener::new(&nowhere, 0o600).unwrap_err();
    assert!(error.to_string().contains("cannot open the folder of"), "{error}");
}

/// Devices of one process usually have their sockets in one folder and are set up together.
#[test]
fn sockets_of_one_folder_are_set_up_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let start = std::sync::Barrier::new(16);
    std::thread::scope(|scope| {
        for n in 0..16 {
            let (start, path) = (&start, dir.path().join(format!("{n}.sock")));
            scope.spawn(move || {
                start.wait();
                for _ in 0..50 {
                    drop(Listener::new(&path, 0o600).unwrap());
                }
            });
        }
    });
}

#[test]
fn only_eventfds_are_adopted_and_none_blocks() {
    let peer = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let ours = adopt_eventfd(peer.try_clone().unwrap()).unwrap();
    rustix::io::write(&ours, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    signal(&ours);
    let mut count = [0; 8];
    rustix::io::read(&peer, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), u64::MAX - 1);
    let (socket, _other) = UnixStream::pair().unwrap();
    let error = adopt_eventfd(socket.into()).unwrap_err().to_string();
    assert!(error.contains("instead of an eventfd"), "{error}");
}

#[test]
fn a_waker_is_cleared_and_wakes_again() {
    let waker = Waker::new().unwrap();
    let is_awake = || {
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            waker.eventfd(),
            rustix::event::PollFlags::IN,
        )];
        let nothing = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&nothing)).unwrap() == 1
    };
    for _ in 0..2 {
        waker.clear();
        assert!(!is_awake());
        waker.clone().wake();
        waker.wake();
        assert!(is_awake());
    }
}

#[test]
fn an_adopted_listener_leaves_the_file_to_its_owner() {
    let folder = folder();
    let path = folder.path().join("a.sock");
    let owner = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let adopted = Listener::adopt(owner.try_clone().unwrap().into()).unwrap();
    assert!(adopted.accept().unwrap().is_none());
    let _client = UnixStream::connect(&path).unwrap();
    assert!(adopted.accept().unwrap().is_some());
    drop(adopted);
    assert!(path.exists());
}

/// What a successor relies on to know whether bytes that its predecessor peeked at are still there.
#[test]
fn the_kernel_remembers_what_was_peeked_at_and_not_consumed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    set_peek_offset(&ours, 0).unwrap();
    rustix::io::write(&theirs, b"0123456789").unwrap();
    let mut bytes = [0; 6];
    let mut peek = |wanted: usize| {
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        rustix::net::recv(&ours, &mut bytes[..wanted], flags).unwrap().0
    };
    assert_eq!(peek(6), 6);
    assert_eq!(peek_offset(&ours).unwrap(), 6);
    rustix::io::read(&ours, &mut [0; 6]).unwrap();
    assert_eq!(peek_offset(&ours).unwrap(), 0);
    assert_eq!(peek(6), 4);
    assert_eq!(peek_offset(&ours).unwrap(), 4);
    set_peek_offset(&ours, 0).unwrap();
    assert_eq!(peek_offset(&ours).unwrap(), 0);
}
