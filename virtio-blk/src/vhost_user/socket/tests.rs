use std::os::unix::net::UnixStream;

use rustix::pipe::pipe;

use super::*;
use crate::testing::TestFrontend;
use crate::vhost_user::wire::{self, Request};

fn pair() -> (TestFrontend, Connection) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (TestFrontend::over(theirs), Connection::new(ours.into()))
}

fn message(connection: &mut Connection) -> Message {
    match connection.receive().unwrap() {
        Received::Message(message) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn messages_come_with_their_descriptors_and_no_others() {
    let (frontend, mut connection) = pair();
    assert!(matches!(connection.receive(), Ok(Received::Empty)));
    let (_reader, writer) = pipe().unwrap();
    let bytes = wire::request(Request::SET_VRING_CALL, false, &[0; 8]);
    // Header and payload apart, descriptors with either.
    frontend.send_raw(&bytes[..12], &[writer.as_fd()]);
    assert!(matches!(connection.receive(), Ok(Received::Empty)));
    frontend.send_raw(&bytes[12..15], &[]);
    frontend.send_raw(&bytes[15..], &[writer.as_fd()]);
    // The next message's are its own.
    frontend.send(Request::GET_FEATURES, true, &[], &[]);
    frontend.send(Request::SET_VRING_ERR, false, &[0; 8], &[writer.as_fd()]);
    let first = message(&mut connection);
    assert_eq!((first.request, first.fds.len()), (Request::SET_VRING_CALL, 2));
    let second = message(&mut connection);
    assert_eq!((second.request, second.fds.len()), (Request::GET_FEATURES, 0));
    assert!(second.need_reply);
    let third = message(&mut connection);
    assert_eq!((third.request, third.fds.len()), (Request::SET_VRING_ERR, 1));
    for fd in first.fds.iter().chain(&third.fds) {
        let flags = rustix::io::fcntl_getfd(fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
    drop(frontend);
    assert!(matches!(connection.receive(), Ok(Received::Closed)));
}

#[test]
fn too_many_descriptors_are_refused_and_closed() {
    for count in [9, 20, 32] {
        let (frontend, mut connection) = pair();
        let (reader, writer) = pipe().unwrap();
        let fds = vec![writer.as_fd(); count];
        frontend.send(Request::SET_MEM_TABLE, false, &[0; 8], &fds);
        drop(writer);
        let error = connection.receive().unwrap_err().to_string();
        assert!(error.contains("more than 8 file descriptors"), "{error}");
        drop(connection);
        assert_eq!(rustix::io::read(&reader, &mut [0]), Ok(0), "some are still open");
    }
}

#[test]
fn descriptors_of_half_a_message_are_closed() {
    let (frontend, mut connection) = pair();
    let (reader, writer) = pipe().unwrap();
    frontend
        .send_raw(&wire::request(Request::SET_VRING_CALL, false, &[0; 8])[..9], &[writer.as_fd()]);
    drop((writer, frontend));
    let error = connection.receive().unwrap_err().to_string();
    assert!(error.contains("in the middle of a message"), "{error}");
    drop(connection);
    assert_eq!(rustix::io::read(&reader, &mut [0]), Ok(0));
}

#[test]
fn replies_wait_for_a_slow_peer() {
    let (frontend, mut connection) = pair();
    let reply = wire::reply(Request::GET_CONFIG, &[7; 1000]);
    let mut sent = 0;
    while !connection.has_output() {
        connection.send(&reply).unwrap();
        sent += 1;
        assert!(sent < 10_000, "the socket's buffer has an end");
    }
    for i in 0..sent {
        assert_eq!(frontend.reply(Request::GET_CONFIG), [7; 1000], "{i}");
        connection.flush().unwrap();
    }
    assert!(!connection.has_output());
}

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
