//! An answer on its way, which answers all who asked for the same meanwhile.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use http::HeaderValue;
use tokio::sync::Notify;

use super::Of;
use super::answer::Answer;
use crate::lifecycle::HeldShare;
use crate::llm::Usage;

/// What a piece takes besides its bytes, about: an answer may come byte by byte.
const PIECE_BYTES: usize = 64;

/// What is known of an answer when it begins.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its `Content-Type`.
    pub content_type: HeaderValue,
    /// When it began.
    pub at: SystemTime,
}

/// How an answer ended that others wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As a whole, and a backend took this much for it.
    Whole(Usage),
    /// In the middle.
    Cut,
    /// It is none for others: each asks for itself.
    Unfit,
    /// Before it began, and through no fault of a backend: another one may ask for all.
    Lost,
}

/// What comes next of an answer.
#[derive(Debug)]
pub enum Next {
    /// More of it.
    Pieces(Vec<Bytes>),
    /// Nothing.
    End(End),
}

/// An answer on its way.
pub struct Flight {
    of: Of,
    state: Mutex<State>,
    changed: Notify,
    /// Woken when somebody follows, or nobody waits for it any more.
    others: Notify,
}

struct State {
    head: Option<Head>,
    pieces: Vec<Bytes>,
    bytes: usize,
    share: HeldShare,
    end: Option<End>,
    /// All of it, where it is whole.
    answer: Option<Arc<Answer>>,
    /// How many wait for it besides who leads.
    followers: usize,
    /// Whether who leads waits for it.
    has_leader: bool,
    /// Whether nobody waited for it once: it ends.
    is_left: bool,
}

/// Somebody who waits for an answer.
pub struct Listener {
    flight: Arc<Flight>,
    leads: bool,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut state = self.flight.state();
        if self.leads {
            state.has_leader = false;
        } else {
            state.followers -= 1;
        }
        if state.followers == 0 && !state.has_leader {
            state.is_left = true;
            drop(state);
            self.flight.others.notify_waiters();
        }
    }
}

impl Flight {
    pub(super) fn new(of: &Of, share: HeldShare) -> Arc<Self> {
        let state = State {
            head: None,
            pieces: Vec::new(),
            bytes: 0,
            share,
            end: None,
            answer: None,
            followers: 0,
            has_leader: false,
            is_left: false,
        };
        let (changed, others) = (Notify::new(), Notify::new());
        Arc::new(Self { of: of.clone(), state: Mutex::new(state), changed, others })
    }

    /// Whose answer it is.
    pub(super) fn of(&self) -> &Of {
        &self.of
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for it from now on, behind who leads; none where it ends because nobody did.
    pub(super) fn follow(self: &Arc<Self>) -> Option<Listener> {
        let mut state = self.state();
        if state.is_left {
            return None;
        }
        state.followers += 1;
        drop(state);
        self.others.notify_waiters();
        Some(Listener { flight: Arc::clone(self), leads: false })
    }

    /// Waits for it as who leads.
    #[must_use]
    pub(super) fn lead(self: &Arc<Self>) -> Listener {
        self.state().has_leader = true;
        Listener { flight: Arc::clone(self), leads: true }
    }

    /// Whether anybody follows.
    #[must_use]
    pub fn has_followers(&self) -> bool {
        self.state().followers > 0
    }

    /// Returns when nobody waits for it.
    pub async fn left(&self) {
        self.until(&self.others, |state| state.is_left.then_some(())).await;
    }

    /// Returns when somebody follows.
    pub async fn followed(&self) {
        self.until(&self.others, |state| (state.followers > 0).then_some(())).await;
    }

    /// Its head.
    ///
    /// # Errors
    /// How it ended, if it never began.
    pub async fn head(&self) -> Result<Head, End> {
        let head = |state: &State| match (&state.head, state.end) {
            // What did not begin for others has not begun.
            (_, Some(End::Unfit)) => Some(Err(End::Unfit)),
            (Some(head), _) => Some(Ok(head.clone())),
            (None, Some(end)) => Some(Err(end)),
            (None, None) => None,
        };
        self.until(&self.changed, head).await
    }

    /// All of it, when it is there.
    ///
    /// # Errors
    /// How it ended, if that is not what others can have.
    pub async fn whole(&self) -> Result<Arc<Answer>, End> {
        let whole = |state: &State| match (&state.answer, state.end) {
            (Some(answer), _) => Some(Ok(Arc::clone(answer))),
            (None, Some(end)) => Some(Err(end)),
            (None, None) => None,
        };
        self.until(&self.changed, whole).await
    }

    /// What comes after so many pieces.
    pub async fn next(&self, after: usize) -> Next {
        let next = |state: &State| {
            let more = state.pieces.get(after..).unwrap_or_default();
            match (more, state.end) {
                ([], Some(end)) => Some(Next::End(end)),
                ([], None) => None,
                (more, _) => Some(Next::Pieces(more.to_vec())),
            }
        };
        self.until(&self.changed, next).await
    }

    /// Waits until there is something.
    async fn until<T>(&self, changed: &Notify, find: impl Fn(&State) -> Option<T>) -> T {
        loop {
            let mut woken = std::pin::pin!(changed.notified());
            woken.as_mut().enable();
            if let Some(found) = find(&self.state()) {
                return found;
            }
            woken.await;
        }
    }

    pub(super) fn begin(&self, head: Head) {
        self.state().head = Some(head);
        self.changed.notify_waiters();
    }

    /// Whether it has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.state().head.is_some()
    }

    /// A piece of it has come; how many bytes there are now. None: there is no room for it.
    pub(super) fn push(&self, piece: &Bytes, total_max: usize) -> Option<usize> {
        let mut state = self.state();
        if !state.share.grow(piece.len() + PIECE_BYTES, total_max) {
            return None;
        }
        state.bytes += piece.len();
        state.pieces.push(piece.clone());
        let bytes = state.bytes;
        drop(state);
        self.changed.notify_waiters();
        Some(bytes)
    }

    /// All of it that has come.
    pub(super) fn body(&self) -> Bytes {
        let state = self.state();
        match &state.pieces[..] {
            [] => Bytes::new(),
            // It may be a part of something larger, which is not to be kept.
            [one] => Bytes::copy_from_slice(one),
            several => several.concat().into(),
        }
    }

    /// It is whole, and this is all of it.
    pub(super) fn is_whole(&self, answer: &Arc<Answer>) {
        self.state().answer = Some(Arc::clone(answer));
    }

    /// Ends it, once.
    pub(super) fn end(&self, end: End) {
        let mut state = self.state();
        if state.end.is_none() {
            state.end = Some(end);
            if end == End::Unfit {
                state.pieces = Vec::new();
                state.share.shrink(0);
            }
        }
        drop(state);
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_byte_by_byte_takes_what_it_takes() {
        let of = Of { pool: "s/m".into(), tenant: "".into() };
        let held = Arc::default();
        let flight = Flight::new(&of, HeldShare::none(&held));
        let byte = Bytes::from_static(b"x");
        let total_max = 10 * (PIECE_BYTES + 1);
        let taken = (0..100).take_while(|_| flight.push(&byte, total_max).is_some()).count();
        assert_eq!((taken, flight.body().len(), held.count()), (10, 10, total_max));
        flight.end(End::Unfit);
        assert_eq!(held.count(), 0);
    }
}
