# Somebody's ANALYZE, and the index that a migration builds, in each other's way.
#
# ANALYZE waits for its lock with a snapshot.  Behind CREATE INDEX CONCURRENTLY
# it waits for the build, and the build, when it comes to wait for all older
# snapshots, for it.  It is the migration that has to give up and try again,
# though ANALYZE was the first to wait.

use strict;
use warnings;

use LabServer;
use Test::More;

# ANALYZE looks for a deadlock after this time, the migration after half its
# lock_timeout: much sooner.
my $node = start_server('build_beside_analyze', q{
autovacuum = off
deadlock_timeout = 20s
risky_migrations.lock_timeout = 250
});
sql(q{
CREATE TABLE item (id int PRIMARY KEY, n int);
INSERT INTO item SELECT g, g FROM generate_series(1, 1000) g;
CREATE INDEX item_n ON item (n);
});


sql(q{CALL rm_add_column('item', 'n', 'bigint')});
sql('CALL rm_backfill_batched()');
sql('CALL rm_enforce_not_null()');

# A writer that keeps the build from going on to the snapshots, as long as the
# keeper is there.
my $keeper = start_call('keeper', 'SELECT pg_advisory_lock(1)', 'SELECT pg_sleep(600)');
wait_for(q{SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND granted}, 'no keeper');
my $writer = start_call('writer', 'BEGIN', 'INSERT INTO item VALUES (1001, 1001)',
	'SELECT pg_advisory_xact_lock(1)', 'COMMIT');
wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'writer' AND wait_event = 'advisory'},
	'the writer does not write');

my $swap = start_call('migration', 'CALL rm_swap()');
wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'virtualxid'},
	'the build does not wait for the writer');
my $analyze = start_call('analyze', 'ANALYZE item');
wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'analyze' AND wait_event = 'relation'},
	'ANALYZE does not wait for the build');
sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keeper'});

ends_well($writer, 'the writer commits');
ends_well($analyze, 'ANALYZE is not the one to give up');
ends_well($swap, 'and the migration tries again');
cmp_ok(sql(q{SELECT sum(lock_retries) FROM risky_migrations.step_log WHERE step IN ('build', 'swap')}),
	'>', 0, 'for they were in each other\'s way');
is( sql(q{SELECT string_agg(format('%s %s', indexrelid::regclass, indisvalid), ', ' ORDER BY indexrelid) FROM pg_index
	WHERE indrelid = 'item'::regclass AND NOT indexrelid::regclass::text LIKE 'rm_o_%'}),
	'item_pkey t, item_n t', 'no index is left invalid');
sql('CALL rm_cleanup()');
is(sql(q{SELECT count(*), pg_typeof(max(n)) FROM item}), '1001|bigint', 'every row is there');
finish_call($keeper);

$node->stop;
done_testing();
