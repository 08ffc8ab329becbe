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
