//! Many connections that begin something and do not end it, from many addresses of loopback: a
//! process of its own, so that their files and memory are not those of the target under test.
//!
//! `strangers ADDR:PORT COUNT`; on standard input a line with the bytes in hexadecimal, of which each
//! connection sends all but the last; then any line, for the last one. Answers `begun` and `whole`.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType};

/// Addresses that they come from: 127.0.1.1 and on.
const ADDRESSES: usize = 40;

fn connect(n: usize, to: SocketAddrV4) -> Result<TcpStream> {
    let from = Ipv4Addr::new(127, 0, 1, (n % ADDRESSES) as u8 + 1);
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &SocketAddr::new(from.into(), 0))?;
    rustix::net::connect(&socket, &SocketAddr::V4(to))?;
    Ok(TcpStream::from(socket))
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let to: SocketAddrV4 = arguments.next().context("no address")?.parse()?;
    let count: usize = arguments.next().context("no count")?.parse()?;
    let mut lines = io::stdin().lock().lines();
    let bytes = lines.next().context("no bytes")??;
    let bytes = (0..bytes.len() / 2)
        .map(|n| u8::from_str_radix(&bytes[2 * n..2 * n + 2], 16))
        .collect::<Result<Vec<u8>, _>>()?;
    let (last, begin) = bytes.split_last().context("no bytes")?;
    let mut streams = Vec::with_capacity(count);
    for n in 0..count {
        let mut stream = connect(n, to).with_context(|| format!("connection {n}"))?;
        // One that was closed already is none.
        let _ = stream.write_all(begin);
        streams.push(stream);
    }
    println!("begun");
    let _ = lines.next();
    for stream in &mut streams {
        let _ = stream.write_all(&[*last]);
    }
    println!("whole");
    // Until nobody wants them any more.
    let _ = lines.next();
    Ok(())
}
