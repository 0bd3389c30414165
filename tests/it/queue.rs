//! Full backends: exchanges wait in line, clients in turns, and are told the truth when they cannot.

use std::net::IpAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::harness::{
    Answer, Connection, Gateway, Upstream, config, eventually, get, http2, send_from,
};

/// An upstream that answers one request for each word of the test; it says who it answered.
struct Held {
    upstream: Upstream,
    release: Sender<()>,
}

impl Held {
    fn start() -> Self {
        let (release, released) = channel();
        let released: Arc<Mutex<Receiver<()>>> = Arc::new(Mutex::new(released));
        let upstream = Upstream::start(move |seen, reply| {
            let _ = released.lock().unwrap().recv();
            reply.text(&seen.target());
        });
        Self { upstream, release }
    }
}

fn request(gateway: &Gateway, client: u8, name: &str) -> JoinHandle<Answer> {
    let address = gateway.address();
    let name = name.to_owned();
    std::thread::spawn(move || {
        let request =
            format!("GET /svc/mdl/{name} HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n");
        send_from(IpAddr::from([127, 0, 8, client]), address, request)
    })
}

#[test]
fn exchanges_beyond_a_backends_bound_wait_and_clients_take_turns() {
    let held = Held::start();
    let gateway = Gateway::start(&config("upstream: {inflight_max: 1}", &[&held.upstream]));
    let mut answers = vec![request(&gateway, 1, "first")];
    eventually("the first is at work", || held.upstream.seen().len() == 1);
    // One client has three waiting when another one comes with one.
    for (number, (client, name)) in
        [(1, "1a"), (1, "1b"), (1, "1c"), (2, "2a")].into_iter().enumerate()
    {
        answers.push(request(&gateway, client, name));
        eventually("it waits", || gateway.inflight() == number as u64 + 2);
    }
    for done in 1..=5 {
        assert_eq!(held.upstream.seen().len(), done, "one at a time");
        held.release.send(()).unwrap();
        eventually("the next is at work", || held.upstream.seen().len() == (done + 1).min(5));
    }
    for answer in answers {
        assert_eq!(answer.join().unwrap().status, 200);
    }
    let order: Vec<String> = held.upstream.seen().iter().map(|seen| seen.target()).collect();
    assert_eq!(order, ["/first", "/1a", "/2a", "/1b", "/1c"]);
}

#[test]
fn a_full_queue_and_a_wait_that_takes_too_long_are_503_with_retry_after() {
    let held = Held::start();
    let settings = "upstream: {inflight_max: 1}\nqueue: {length_max: 1, timeout: 500ms}";
    let gateway = Gateway::start(&config(settings, &[&held.upstream]));
    let first = request(&gateway, 1, "first");
    eventually("the first is at work", || held.upstream.seen().len() == 1);
    let second = request(&gateway, 1, "second");
    eventually("the second waits", || gateway.inflight() == 2);
    let refused = get(gateway.address(), "/svc/mdl/third", &[]);
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (503, Some("busy")));
    assert!(refused.header("retry-after").parse::<u64>().unwrap() >= 1);
    let late = second.join().unwrap();
    assert_eq!((late.status, late.json()["error"]["code"].as_str()), (503, Some("busy")));
    held.release.send(()).unwrap();
    assert_eq!(first.join().unwrap().status, 200);
    assert_eq!(held.upstream.seen().len(), 1, "nobody else got through");
}

#[test]
fn another_backend_with_room_is_asked_before_anybody_waits() {
    let held = Held::start();
    let free = Upstream::named("free");
    let settings = "upstream: {inflight_max: 1}\nbalance: round_robin";
    let gateway = Gateway::start(&config(settings, &[&held.upstream, &free]));
    let mut first = Some(request(&gateway, 1, "x"));
    eventually("one is held", || {
        if !held.upstream.seen().is_empty() {
            return true;
        }
        if let Some(done) = first.take_if(|first| first.is_finished()) {
            assert_eq!(done.join().unwrap().text(), "free");
            first = Some(request(&gateway, 1, "x"));
        }
        false
    });
    for _ in 0..10 {
        assert_eq!(get(gateway.address(), "/svc/mdl/y", &[]).text(), "free");
    }
    held.release.send(()).unwrap();
    assert_eq!(first.unwrap().join().unwrap().status, 200);
}

#[test]
fn a_client_that_leaves_the_queue_leaves_its_place_to_the_next() {
    let held = Held::start();
    let gateway = Gateway::start(&config("upstream: {inflight_max: 1}", &[&held.upstream]));
    let first = request(&gateway, 1, "first");
    eventually("the first is at work", || held.upstream.seen().len() == 1);
    let mut leaving = Connection::open(gateway.address());
    leaving.write(b"GET /svc/mdl/leaving HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    eventually("it waits", || gateway.inflight() == 2);
    let last = request(&gateway, 2, "last");
    eventually("the last one waits too", || gateway.inflight() == 3);
    drop(leaving);
    let noticed = eventually("it is gone", || gateway.inflight() == 2);
    assert!(noticed < Duration::from_millis(200), "{noticed:?}");
    held.release.send(()).unwrap();
    assert_eq!(first.join().unwrap().status, 200);
    eventually("the last is at work", || held.upstream.seen().len() == 2);
    held.release.send(()).unwrap();
    assert_eq!(last.join().unwrap().text(), "/last");
}

#[test]
fn max_connections_bounds_what_is_in_flight_and_loses_no_request() {
    let upstream = Upstream::start(|_, reply| {
        std::thread::park_timeout(Duration::from_millis(2));
        reply.text("ok");
    });
    let text = config("", &[&upstream]);
    let gateway = Gateway::start_with(&text, &[("MAX_CONNECTIONS", "3")], &[]);
    let clients: Vec<_> = (0..20_u8)
        .map(|client| {
            let address = gateway.address();
            std::thread::spawn(move || {
                for _ in 0..20 {
                    let request = "GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n";
                    let answer = send_from(IpAddr::from([127, 0, 8, client]), address, request);
                    assert_eq!(answer.status, 200);
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    assert!(upstream.most_at_once() <= 3, "{}", upstream.most_at_once());
    assert_eq!(upstream.seen().len(), 400);
}

#[test]
fn who_waits_goes_to_a_backend_that_comes_back() {
    let held = Held::start();
    let mut back = Upstream::named("back");
    back.kill();
    let settings = "upstream: {inflight_max: 1}\nhealth_check: {interval: 200ms}";
    let gateway = Gateway::start(&config(settings, &[&held.upstream, &back]));
    gateway.wait_backend("svc/mdl", "b", "unhealthy");
    let first = request(&gateway, 1, "first");
    eventually("the first is at work", || held.upstream.seen().len() == 1);
    let second = request(&gateway, 2, "second");
    eventually("the second waits", || gateway.inflight() == 2);
    back.restart();
    assert_eq!(second.join().unwrap().text(), "back");
    held.release.send(()).unwrap();
    assert_eq!(first.join().unwrap().text(), "/first");
}

#[test]
fn after_a_failed_attempt_a_full_backend_is_waited_for_before_the_same_one_is_asked_again() {
    let held = Held::start();
    let failing = Upstream::start(|_, reply| reply.send(503, &[], b"no"));
    let settings = "balance: round_robin\nupstream: {inflight_max: 1}\nbreaker: {enabled: false}";
    let gateway = Gateway::start(&config(settings, &[&held.upstream, &failing]));
    let first = request(&gateway, 1, "first");
    eventually("the first is at work", || held.upstream.seen().len() == 1);
    let before = failing.seen().len();
    let second = request(&gateway, 2, "second");
    eventually("the second was sent away", || failing.seen().len() == before + 1);
    // Places at the one that failed are not for it, and not closed to others.
    let third = request(&gateway, 3, "third");
    let soon = eventually("the third was sent away too", || failing.seen().len() == before + 2);
    assert!(soon < Duration::from_millis(500), "{soon:?}");
    assert_eq!(gateway.inflight(), 3);
    for _ in 0..3 {
        held.release.send(()).unwrap();
    }
    let answers = [first, second, third].map(|answer| answer.join().unwrap().text());
    assert_eq!(answers, ["/first", "/second", "/third"]);
    assert_eq!(failing.seen().len(), before + 2);
}

#[test]
fn who_is_sent_again_on_a_new_connection_keeps_its_place() {
    let (release, released) = channel();
    let released: Arc<Mutex<Receiver<()>>> = Arc::new(Mutex::new(released));
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let upstream = Upstream::start(move |seen, reply| {
        if seen.target == b"/first" && calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0
        {
            let _ = released.lock().unwrap().recv();
            return reply.cut();
        }
        reply.text(&seen.target());
    });
    // Each thread keeps connections of its own.
    let settings = "threads: 1\nupstream: {inflight_max: 1}";
    let gateway = Gateway::start(&config(settings, &[&upstream]));
    assert_eq!(get(gateway.address(), "/svc/mdl/warm", &[]).text(), "/warm");
    let first = request(&gateway, 1, "first");
    eventually("the first is at work", || upstream.seen().len() == 2);
    let second = request(&gateway, 2, "second");
    eventually("the second waits", || gateway.inflight() == 2);
    release.send(()).unwrap();
    assert_eq!(first.join().unwrap().text(), "/first");
    assert_eq!(second.join().unwrap().text(), "/second");
    let order: Vec<String> = upstream.seen().iter().map(|seen| seen.target()).collect();
    assert_eq!(order, ["/warm", "/first", "/first", "/second"]);
}

#[test]
fn the_time_in_line_does_not_count_against_a_bodys_deadline() {
    let held = Held::start();
    let settings =
        "upstream: {inflight_max: 1}\nreplay: {body_bytes_max: 0}\nclient: {body_deadline: 500ms}";
    let gateway = Gateway::start(&config(settings, &[&held.upstream]));
    let first = request(&gateway, 1, "first");
    eventually("the first is at work", || held.upstream.seen().len() == 1);
    let mut second = Connection::open(gateway.address());
    second
        .write(b"POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst")
        .unwrap();
    eventually("the second waits", || gateway.inflight() == 2);
    std::thread::park_timeout(Duration::from_millis(800));
    held.release.send(()).unwrap();
    assert_eq!(first.join().unwrap().status, 200);
    std::thread::park_timeout(Duration::from_millis(100));
    second.write(b"-last").unwrap();
    held.release.send(()).unwrap();
    assert_eq!(second.read(false).unwrap().status, 200);
    assert_eq!(held.upstream.last().body, b"first-last");
}

#[tokio::test]
async fn an_http_2_client_that_leaves_the_queue_in_the_middle_of_its_body_is_let_go() {
    let held = Held::start();
    let settings = "upstream: {inflight_max: 1}\nreplay: {body_bytes_max: 0}";
    let gateway = Gateway::start(&config(settings, &[&held.upstream]));
    let first = request(&gateway, 1, "first");
    eventually("the first is at work", || held.upstream.seen().len() == 1);
    let mut client = http2(gateway.address()).await;
    let request = http::Request::post("http://g/svc/mdl/x").body(()).unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    body.send_data("begun".into(), false).unwrap();
    let inflight = async |wanted| {
        let began = std::time::Instant::now();
        while gateway.inflight() != wanted {
            assert!(began.elapsed() < Duration::from_secs(10), "it never came to {wanted}");
            tokio::task::yield_now().await;
        }
        began.elapsed()
    };
    inflight(2).await;
    body.send_reset(h2::Reason::CANCEL);
    drop(response);
    let noticed = inflight(1).await;
    assert!(noticed < Duration::from_millis(200), "{noticed:?}");
    held.release.send(()).unwrap();
    assert_eq!(first.join().unwrap().status, 200);
}
