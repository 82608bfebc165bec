/*-------------------------------------------------------------------------
 *
 * snapshots.c
 *	  Waiting for snapshots that are older than what has been committed.
 *
 * Before something takes the place of what others read, nobody may be left who
 * could read it with a snapshot from before it was filled.  The wait holds
 * nothing, neither lock nor snapshot, and says for whom it waits.
 *
 * At the first look these are all who have a snapshot in this database.  Whoever has
 * got one since has one that is new enough, unless it was handed on: by
 * pg_export_snapshot() and SET TRANSACTION SNAPSHOT, or by CREATE_REPLICATION_SLOT, whose
 * snapshot is as old as the WAL that it has read.  That is told by its xmin, the oldest
 * transaction in progress when it was taken (in any database): this grows from one
 * snapshot to the next.  So whose xmin is older than that of a snapshot of ours, taken
 * at the first look, is waited for too.
 *
 * What remains: a snapshot that is handed on after the first look, by one that ends before
 * the other, and whose xmin is still in progress at the first look.  It looks like a new
 * one.  So an open transaction that has written must be older than the snapshot.
 *
 * Who is passed over: other databases, for snapshots are not handed on between them;
 * with them physical walsenders, whose xmin is a standby's (hot_standby_feedback), for
 * they belong to none; VACUUM, which reads no rows for anybody; prepared transactions, which
 * have no snapshot, and cannot have exported one; and ourselves.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "compat.h"
#include "miscadmin.h"
#include "risky_migrations.h"
#include "snapshots.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* how often a waiting step looks whether the snapshots are gone, milliseconds */
#define SNAPSHOT_LOOK 200

/* whose snapshots have an xmin that is not newer */
static VirtualTransactionId *
snapshots_until(TransactionId xmin, int *n)
{
	return GetCurrentVirtualXIDs(xmin, true, false, PROC_IS_AUTOVACUUM | PROC_IN_VACUUM, n);
}

/* the xmin of a snapshot that is taken now */
static TransactionId
oldest_in_progress(void)
{
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	TransactionId xmin = snapshot->xmin;

	UnregisterSnapshot(snapshot);
	return xmin;
}

static bool
is_among(VirtualTransactionId vxid, const VirtualTransactionId *list, int n)
{
	for (int i = 0; i < n; i++)
		if (VirtualTransactionIdEquals(vxid, list[i]))
			return true;
	return false;
}

/*
 * True when nobody in this database has a snapshot any more that was taken
 * before this run began to wait, see the top of the file.  On a later visit of the
 * same session another snapshot, which cannot be told from the first, counts too: only
 * its transaction's end does.
 */
static bool
snapshots_are_gone(RmRun *run, RmSnapshotWait *s, PGPROC **oldest)
{
	bool		first = s->began == 0;
	VirtualTransactionId *now;
	VirtualTransactionId *old;
	VirtualTransactionId *waiting;
	int			nnow;
	int			nold;
	int			n = 0;

	InvalidateCatalogSnapshot();
	if (first)
	{
		/* before the look: who comes in between is in the list */
		s->oldest = oldest_in_progress();
		TransactionIdRetreat(s->oldest);
	}
	/* in this order: who takes over from one who is gone by then is found */
	now = snapshots_until(ReadNextTransactionId(), &nnow);
	old = snapshots_until(s->oldest, &nold);
	waiting = MemoryContextAlloc(run->cxt, sizeof(VirtualTransactionId) * Max(nnow + nold, 1));
	for (int i = 0; i < nnow; i++)
		if (first || is_among(now[i], s->waiting, s->nwaiting))
			waiting[n++] = now[i];
	for (int i = 0; i < nold; i++)
		if (!is_among(old[i], waiting, n))
			waiting[n++] = old[i];
	if (s->waiting)
		pfree(s->waiting);
	s->waiting = waiting;
	s->nwaiting = n;
	if (first)
		s->began = GetCurrentTimestamp();
	*oldest = n > 0 ? rm_backend_proc(waiting[0]) : NULL;
	return n == 0;
}

/*
 * Waits for them, a look each transaction; true when they are gone.  55006 after
 * risky_migrations.snapshot_timeout: an older snapshot keeps ..., since why; call
 * is what to do then.
 */
bool
rm_wait_for_snapshots(RmRun *run, RmSnapshotWait *s, const char *keeps, const char *why,
					  const char *call)
{
	PGPROC	   *oldest;

	if (snapshots_are_gone(run, s, &oldest))
		return true;
	if (TimestampDifferenceExceeds(s->began, GetCurrentTimestamp(), rm_snapshot_timeout))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("an older snapshot keeps %s", keeps),
				 errdetail("Process %d has held it for more than %d s; %s.",
						   oldest ? oldest->pid : 0, rm_snapshot_timeout / 1000, why),
				 errhint("End that transaction, or raise risky_migrations.snapshot_timeout; then %s.", call)));
	if (rm_notice_due(run))
		ereport(NOTICE,
				(errmsg("migration %lld: waiting for %d transactions with snapshots older than the last batch, the first is process %d",
						(long long) run->migration_id, s->nwaiting, oldest ? oldest->pid : 0)));
	run->pause_ms = SNAPSHOT_LOOK;
	run->wait_kind = "snapshot";
	run->wait_reason = psprintf("%d transactions have snapshots older than the last batch, the first is process %d",
								s->nwaiting, oldest ? oldest->pid : 0);
	return false;
}

