/*-------------------------------------------------------------------------
 *
 * snapshots.c
 *	  Waiting for snapshots that are older than what has been committed.
 *
 * Before something takes the place of what others read, nobody may be left who
 * could read it with a snapshot from before it was filled.  The wait holds
 * nothing, neither lock nor snapshot, and says for whom it waits.
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

/* whose snapshots may be older than what is committed by now */
static VirtualTransactionId *
older_snapshots(int *n)
{
	return GetCurrentVirtualXIDs(ReadNextTransactionId(), true, false,
								 PROC_IS_AUTOVACUUM | PROC_IN_VACUUM, n);
}

/*
 * True when nobody in this database has a snapshot any more that was taken
 * before this run began to wait.  On a later visit of the same session another
 * snapshot, which cannot be told from the first, counts too: only its
 * transaction's end does.
 */
static bool
snapshots_are_gone(RmRun *run, RmSnapshotWait *s, PGPROC **oldest)
{
	VirtualTransactionId *now;
	int			n;
	int			left = 0;

	InvalidateCatalogSnapshot();
	now = older_snapshots(&n);
	if (s->waiting == NULL)
	{
		s->waiting = MemoryContextAlloc(run->cxt, sizeof(VirtualTransactionId) * Max(n, 1));
		memcpy(s->waiting, now, sizeof(VirtualTransactionId) * n);
		s->nwaiting = n;
		s->began = GetCurrentTimestamp();
	}
	*oldest = NULL;
	for (int i = 0; i < s->nwaiting; i++)
		for (int j = 0; j < n; j++)
			if (VirtualTransactionIdEquals(s->waiting[i], now[j]))
			{
				if (*oldest == NULL)
					*oldest = rm_backend_proc(s->waiting[i]);
				s->waiting[left++] = s->waiting[i];
				break;
			}
	s->nwaiting = left;
	return left == 0;
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

